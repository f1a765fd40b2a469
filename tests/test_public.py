"""The public names, and calls of them that are wrong."""

import ast
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxlm
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer

CONFIG = jaxlm.ModelConfig(
    vocab_size=8,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    hidden_dim=8,
    context_length=6,
    dtype="float32",
)
OTHER = dataclasses.replace(CONFIG, num_layers=3, qk_norm="head")
KEY = jax.random.key(0)
TOKENS = np.array([[1, 2, 3]])


def test_every_name_is_there_and_documented():
    for name in jaxlm.__all__:
        if name != "SITES":
            assert getattr(jaxlm, name).__doc__, name
    assert set(jaxlm.__all__) == set(dir(jaxlm))
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        jaxlm.nope  # noqa: B018


def test_type_checkers_and_python_see_the_same_names():
    """The imports that are only read by tools say where each name is."""
    tree = ast.parse(Path(jaxlm.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    named = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(named) == set(jaxlm.__all__)
    assert named == {n: f"jaxlm.{module}" for n, module in jaxlm._MODULE_OF.items()}


def test_each_public_name_is_on_a_page_of_the_reference():
    folder = Path(__file__).parents[1] / "docs" / "api"
    pages = "\n".join(page.read_text() for page in folder.glob("*.md"))
    documented = set(re.findall(r"^::: jaxlm\.(.+)$", pages, re.MULTILINE))
    assert set(jaxlm._MODULES) <= documented


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: jaxlm.init(CONFIG, key))(KEY)


@pytest.fixture
def as_users_run(monkeypatch):
    """Without the checks of types that only tests have."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def full_cache():
    cache = jaxlm.init_cache(CONFIG, 1, 4, jnp.float32)
    return dataclasses.replace(cache, lengths=jnp.array([2]))


def q_and_k(*heads, batch=1):
    return [jnp.zeros((batch, 3, n, 4)) for n in heads]


def with_norms(params):
    attention = {**params["layers"]["attn"], "k_norm": {"scale": jnp.ones((2, 4))}}
    return {**params, "layers": {**params["layers"], "attn": attention}}


def without(params, name):
    return {n: v for n, v in params.items() if n != name}


class Wider(jaxlm.Block):
    def __call__(self, x, context, cache, probe):
        return jnp.concatenate([x, x], axis=-1), cache


WRONG = {
    "forward(CONFIG, params, [1, 2])": "shape (2,), but forward takes rows, [B, T]: a single row is tokens[None]",
    "forward(CONFIG, params, TOKENS * 1.0)": "tokens has dtype float64: ids are integers",
    "forward(CONFIG, params, 'hello')": "tokens is text: give ids",
    "forward(CONFIG, params, [[1, 2], [1]])": "rows of 1 to 2 ids: pad them",
    "forward(CONFIG, params, TOKENS + 5)": "tokens has the id 8: ids are 0 to 7",
    "forward(CONFIG, params, TOKENS - 2)": "tokens has the id -1: ids are 0 to 7",
    "forward(CONFIG, params, TOKENS.astype(np.int64) + 2**32)": "tokens has the id 42949672",
    "forward(CONFIG, params, [[1, 2**32 + 1]])": "tokens has the id 4294967297: ids",
    "forward(CONFIG, params, np.zeros((1, 0), int))": "rows without a token",
    "forward(CONFIG, params, [[1, 2]], positions=np.zeros((1, 1), int))": "positions has shape (1, 1) and dtype",
    "forward(CONFIG, params, [[1, 2]], segment_ids=np.ones((1, 2)))": "give an integer for each token, (1, 2)",
    "forward(CONFIG, params, np.zeros((1, 7), int))": "rows of 7, more than model.context_length 6",
    "forward(CONFIG, params, TOKENS, cache=full_cache())": "the cache holds 2 of 4 tokens, and 3 more do not fit",
    "forward(params, CONFIG, TOKENS)": "config is a dict, not a ModelConfig: the order is (config, params, ...)",
    "forward(CONFIG, TOKENS, params)": "params is a ndarray, not a nested dict of arrays",
    "forward(jaxlm.Config(model=CONFIG, data=jaxlm.config.DataConfig(sequence_length=4)), params, TOKENS)": "give its model, config.model",
    "forward(OTHER, params, TOKENS)": "layers/attn/q has shape (2, 8, 2, 4), and the config asks for (3, 8, 2, 4)",
    "forward(CONFIG, without(params, 'embed'), TOKENS)": "params have no embed/table",
    "forward(CONFIG, with_norms(params), TOKENS)": "params have layers/attn/k_norm/scale, which the config does not ask for",
    "forward(CONFIG, params, TOKENS, taps=('attn_probs',))": "'attn_probs', which is no Tap: give Tap('attn_probs')",
    "forward(CONFIG, params, TOKENS, taps='attn_probs')": "taps is 'attn_probs': give a tuple of taps",
    "forward(CONFIG, params, TOKENS, taps=jaxlm.Tap('z'))": "give a tuple of taps, (Tap(...),)",
    "forward(CONFIG, params, TOKENS, taps=[jaxlm.Tap('attn_prob')])": "(did you mean 'attn_probs'?)",
    "forward(CONFIG, params, TOKENS, taps=[jaxlm.Tap('z', layers=0)])": "layers is 0: give a tuple",
    "forward(CONFIG, params, TOKENS, block=Wider(CONFIG, None))": "give a class that inherits from jaxlm.Block",
    "forward(CONFIG, params, TOKENS, block=Wider)": "Wider turns x of float32[1, 3, 8] into float32[1, 3, 16]",
    "init(CONFIG, 0)": "key is 0: make one with jax.random.key(seed)",
    "init(KEY, CONFIG)": "config is a PRNGKeyArray, not a ModelConfig",
    "init(CONFIG, KEY, block=print)": "give a class that inherits from jaxlm.Block",
    "init(dataclasses.replace(CONFIG, vocab_size=0), KEY)": "model.vocab_size is 0",
    "init_cache(params, 1, 4, 'float32')": "config is a dict, not a ModelConfig",
    "init_cache(CONFIG, 1, 7, 'float32')": "longer than model.context_length 6",
    "unembed(params, CONFIG, TOKENS)": "config is a dict, not a ModelConfig",
    "generate(params, CONFIG, [[1]])": "config is a dict, not a ModelConfig",
    "generate(CONFIG, KEY, [[1]])": "params is a PRNGKeyArray, not a nested dict",
    "cross_entropy(jnp.zeros((1, 3, 8)), TOKENS[:, 1:])": "logits[:, :-1] to tokens[:, 1:]",
    "cross_entropy(jnp.zeros((1, 3, 8)), np.array([[1, 2, -100]]))": "targets has the id -100: ids are 0 to 7",
    "cross_entropy(jnp.zeros((1, 2, 8)), np.array([[1, 2**32]]))": "targets has the id 4294967296: ids",
    "attention(*q_and_k(6, 4, 4))": "6 query heads (axis 2 of q) are not a multiple of 4 key/value heads (axis 2 of k)",
    "attention(*(x.astype(int) for x in q_and_k(2, 2, 2)))": "q is of int32: give floating-",
    "attention(*q_and_k(2, 2, 2), AttentionSpec(1.0, Mask(window=0)))": "the window is 0: it",
    "attention(*q_and_k(2, 2, 2), AttentionSpec(1.0, soft_cap=0.0))": "the soft cap is 0.0: it",
    "attention(*q_and_k(2, 2, 1))": "[B, S, K, H] for both k and v",
    "attention(*q_and_k(2), *q_and_k(2, 2, batch=2))": "must have the same batch and head dimension",
    "preset('llama3.2-1B')": "no preset 'llama3.2-1B' (did you mean 'llama3.2-1b'?)",
    "preset(1)": "no preset 1",
    "ByteTokenizer().decode(np.ones((2, 5), np.float32))": "ids are integers, not float32 of shape (2, 5): for logits",
    "load('runs/nope', dtype='int32')": "dtype is 'int32': weights are floating-point",
    "load('runs/nope', dtype='nope')": "dtype is 'nope': weights are floating-point",
    "load('runs/nope')": "runs/nope is not a checkpoint",
    "load_tokenizer('runs/nope')": "it does not exist",
    "save('.', CONFIG, params, ByteTokenizer())": ". already exists: choose another name",
    "save('new', CONFIG, params, ByteTokenizer())": "the tokenizer has 257 tokens and the model 8",
    "save('new', CONFIG, params, 'chars')": "tokenizer is a str",
    "save('new', CONFIG, quantize_matrices(params, 'int8'), ByteTokenizer())": "embed/table is quantized, which no checkpoint holds",
    "generate(CONFIG, jax.tree.map(lambda x: x.astype(int), params), [[1]])": "weights are floating-point numbers",
    "save('new', params, CONFIG, ByteTokenizer())": "config is a dict, not a ModelConfig",
}


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_are_answered_in_one_line(
    call, params, as_users_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    names = {
        **globals(),
        "ByteTokenizer": ByteTokenizer,
        "params": params,
        **{n: getattr(jaxlm, n) for n in jaxlm.__all__},
    }
    with pytest.raises(ValueError) as error:
        eval(call, names)
    line = str(error.value)
    assert WRONG[call] in line
    assert "\n" not in line and len(line) < 400


def test_a_compiled_call_has_no_check_of_values(params):
    """Ids are looked at outside jit only, so nothing is added to the program."""

    def plain(tokens):
        return jaxlm.forward(CONFIG, params, tokens).logits

    text = str(jax.make_jaxpr(plain)(jnp.asarray(TOKENS)))
    assert "reduce_min" not in text and "callback" not in text
    jax.eval_shape(plain, jax.ShapeDtypeStruct((1, 3), jnp.int32))


@pytest.mark.parametrize("compiled", [False, True])
def test_without_a_mesh(params, compiled):
    assert jax.sharding.get_abstract_mesh().empty

    def call(params, tokens):
        out = jaxlm.forward(CONFIG, params, tokens, taps=(jaxlm.Tap("resid_post"),))
        lens = jaxlm.unembed(CONFIG, params, out.trace["resid_post"], norm=True)
        loss = jaxlm.cross_entropy(out.logits[:, :-1], tokens[:, 1:]).mean()
        return out.logits, lens, loss

    logits, lens, loss = (jax.jit(call) if compiled else call)(params, TOKENS)
    assert lens.shape == (2, *logits.shape)
    # The last layer's lens is the model.
    np.testing.assert_allclose(lens[-1], logits, rtol=1e-6, atol=1e-6)
    p = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum(-1, keepdims=True)
    wanted = -np.log([p[0, 0, 2], p[0, 1, 3]]).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


@pytest.mark.parametrize("axes", [0, 1, 3])
def test_unembed_takes_any_leading_axes(params, axes):
    x = jax.random.normal(KEY, (*(2, 1, 3)[:axes], CONFIG.model_dim))
    logits = jaxlm.unembed(CONFIG, params, x)
    wanted = x @ params["embed"]["table"].T
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_saved_is_loaded(params, tmp_path):
    tokenizer = CharTokenizer("abcdef")
    jaxlm.save(tmp_path / "run", CONFIG, params, tokenizer)
    config, loaded = jaxlm.load(tmp_path / "run")
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jaxlm.load_tokenizer(tmp_path / "run").fingerprint == tokenizer.fingerprint
