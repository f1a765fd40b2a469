"""Compares the sampling rules with llama.cpp's samplers on the same logits.

They are called by the C interface of the package xllamacpp, which is llama.cpp in a
wheel. transformers has no DRY, XTC, top-n-sigma, presence and frequency penalty.
"""

import ctypes
import dataclasses
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_case import small
from parity_case import nested, weights

from jaxlm.checkpoint.gguf.gguf_model import write_model
from jaxlm.config import SampleConfig
from jaxlm.infer.row_settings import row_settings
from jaxlm.infer.rules.filters import NEVER
from jaxlm.infer.rules.penalties import History
from jaxlm.infer.sampling import filtered, penalized
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

pytestmark = pytest.mark.slow

B, S, PROMPT = 32, 48, 20
RNG = np.random.default_rng(0)
TOKENIZER = ByteTokenizer()
V = TOKENIZER.vocab_size
LOGITS = RNG.normal(0, 3, (B, V)).astype(np.float32)
# Few different bytes, so that runs of them are repeated, and among them two breakers.
TEXT = RNG.choice(np.frombuffer(b"aaaaaaabb:\n", np.uint8), (B, S)).astype(np.int32)
BREAKERS = SampleConfig().dry_breakers


class Token(ctypes.Structure):
    """`llama_token_data`."""

    _fields_ = [
        ("id", ctypes.c_int32),
        ("logit", ctypes.c_float),
        ("p", ctypes.c_float),
    ]


class Tokens(ctypes.Structure):
    """`llama_token_data_array`."""

    _fields_ = [
        ("data", ctypes.POINTER(Token)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    ]


class Structure(ctypes.Structure):
    """Some structure of llama.cpp that is passed by value; no other one is larger."""

    _fields_ = [("bytes", ctypes.c_uint8 * 512)]


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """llama.cpp's library, and a vocabulary in which each byte is a token."""
    spec = find_spec("xllamacpp")
    library = ctypes.CDLL(str(*Path(spec.origin).parent.glob("xllamacpp*.so")))
    config = dataclasses.replace(small("smollm2-135m"), vocab_size=V, dtype="float32")
    params = jax.tree.map(jnp.asarray, nested(weights(config)))
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_model(path, config, params, TOKENIZER, "f32")
    library.llama_model_default_params.restype = Structure
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Structure]
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_backend_init()
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    assert model
    return library, library.llama_model_get_vocab(model)


def theirs(llama_cpp, samplers, seen):
    """Applies samplers to each row; each has seen so many of the row's last tokens."""
    library, vocab = llama_cpp
    rows = np.full((B, V), NEVER, np.float32)
    for row, text in enumerate(TEXT):
        data = (Token * V)(*((i, LOGITS[row, i], 0.0) for i in range(V)))
        tokens = Tokens(data, V, -1, False)
        for (name, *arguments), last in zip(samplers, seen, strict=True):
            if name == "dry":
                arguments = [ctypes.c_void_p(vocab), *arguments]
            make = getattr(library, f"llama_sampler_init_{name}")
            make.restype = ctypes.c_void_p
            sampler = ctypes.c_void_p(make(*arguments))
            for token in text[S - last :]:
                library.llama_sampler_accept(sampler, ctypes.c_int32(int(token)))
            library.llama_sampler_apply(sampler, ctypes.byref(tokens))
            library.llama_sampler_free(sampler)
        for token in tokens.data[: tokens.size]:
            rows[row, token.id] = max(token.logit, NEVER)
    return rows


@jax.jit
def ours(settings):
    history = History(jnp.asarray(TEXT), jnp.full(B, S), jnp.full(B, PROMPT))
    keys = jax.random.split(jax.random.key(0), B)
    return filtered(penalized(jnp.asarray(LOGITS), settings, history), keys, settings)


def number(value):
    return ctypes.c_float(value)


ONE, ALL = ctypes.c_size_t(1), S


def repetition(penalty):
    return "penalties", V, S, number(penalty), number(0.0), number(0.0)


def presence_and_frequency(presence, frequency):
    return "penalties", V, S, number(1.0), number(frequency), number(presence)


def dry(multiplier, base, allowed_length):
    texts = (ctypes.c_char_p * len(BREAKERS))(*(text.encode() for text in BREAKERS))
    floats = number(multiplier), number(base)
    return "dry", *floats, allowed_length, S, texts, ctypes.c_size_t(len(BREAKERS))


def xtc(probability, threshold):
    return "xtc", number(probability), number(threshold), ONE, ctypes.c_uint32(0)


# Our fields, their samplers, and how many of the last tokens each of these sees.
RULES = {
    "top_n_sigma": ({"top_n_sigma": 1.3}, [("top_n_sigma", number(1.3))], [0]),
    "xtc": ({"xtc_probability": 1.0, "xtc_threshold": 0.05}, [xtc(1.0, 0.05)], [0]),
    "presence": (
        {"presence_penalty": 0.7},
        [presence_and_frequency(0.7, 0)],
        [S - PROMPT],
    ),
    "frequency": (
        {"frequency_penalty": 0.3},
        [presence_and_frequency(0, 0.3)],
        [S - PROMPT],
    ),
    "dry": ({"dry_multiplier": 0.8}, [dry(0.8, 1.75, 2)], [ALL]),
    "dry of longer ones": (
        {"dry_multiplier": 0.5, "dry_base": 2.5, "dry_allowed_length": 4},
        [dry(0.5, 2.5, 4)],
        [ALL],
    ),
    "repetition": ({"repetition_penalty": 1.7}, [repetition(1.7)], [ALL]),
    "temperature": ({"temperature": 0.7}, [("temp", number(0.7))], [0]),
    "top_k": ({"top_k": 7}, [("top_k", 7)], [0]),
    "top_p": ({"top_p": 0.8}, [("top_p", number(0.8), ONE)], [0]),
    "min_p": ({"min_p": 0.05}, [("min_p", number(0.05), ONE)], [0]),
    "typical": ({"typical_p": 0.7}, [("typical", number(0.7), ONE)], [0]),
    # In our order.
    "composed": (
        {
            **{"repetition_penalty": 1.2, "presence_penalty": 0.4},
            **{"frequency_penalty": 0.2, "dry_multiplier": 0.8, "temperature": 1.5},
            **{"top_n_sigma": 2.0, "top_k": 60, "top_p": 0.95, "min_p": 0.01},
            **{"typical_p": 0.95, "xtc_probability": 1.0, "xtc_threshold": 0.1},
        },
        [
            repetition(1.2),
            presence_and_frequency(0.4, 0.2),
            dry(0.8, 1.75, 2),
            ("temp", number(1.5)),
            ("top_n_sigma", number(2.0)),
            ("top_k", 60),
            ("top_p", number(0.95), ONE),
            ("min_p", number(0.01), ONE),
            ("typical", number(0.95), ONE),
            xtc(1.0, 0.1),
        ],
        [ALL, S - PROMPT, ALL, *[0] * 7],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_logits_are_those_of_llama_cpp(llama_cpp, rule):
    fields, samplers, seen = RULES[rule]
    wanted = theirs(llama_cpp, samplers, seen)
    samples = [SampleConfig(**fields)] * B
    settings = row_settings(samples, V, TOKENIZER.token_bytes)
    found = np.asarray(ours(jax.tree.map(jnp.asarray, settings)))
    dropped = wanted <= NEVER / 2
    np.testing.assert_array_equal(found <= NEVER / 2, dropped)
    np.testing.assert_allclose(found[~dropped], wanted[~dropped], rtol=1e-5, atol=1e-5)
    # In each row the rule does something, but where no repetition is long enough.
    changed = (dropped | (wanted != LOGITS)).any(axis=1)
    assert changed.sum() >= (B // 4 if rule.startswith("dry") else B)
