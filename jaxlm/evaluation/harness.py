"""An adapter for lm-evaluation-harness (the extra `eval`).

from lm_eval import simple_evaluate
from jaxlm.evaluation.harness import JaxLM

simple_evaluate(JaxLM(config, params, tokenizer), tasks=["lambada_openai"])
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# In the extra `eval` alone, which the type checker need not have.
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.evaluation.multiple_choice import loglikelihoods
from jaxlm.infer.generate import generate
from jaxlm.infer.rules.stop_strings import until_stop
from jaxlm.infer.scoring import score
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

# Requests that are computed by one call.
_ROWS = 64


class JaxLM(LM):
    """A jaxlm model as the harness calls it; requests are answered in batches."""

    def __init__(self, config: ModelConfig, params: Params, tokenizer: Tokenizer):
        """Takes what `load` and `load_tokenizer` return."""
        super().__init__()
        self._config, self._params, self._tokenizer = config, params, tokenizer

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Answers requests of (context, continuation), as `loglikelihoods` does."""
        found = []
        for batch in _batches(requests):
            pairs: list[Any] = [request.args for request in batch]
            found += loglikelihoods(self._config, self._params, self._tokenizer, pairs)
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Returns the log-likelihood of whole texts, in windows that do not overlap.

        As the harness asks, the first token has a bos or eos token before it.
        """
        context = self._config.context_length
        prefix = self._prefix_id()
        found = []
        for request in requests:
            ids = [prefix, *self._tokenizer.encode(request.args[0]).tolist()]
            # Each token is predicted once, after the token before it at least.
            starts = range(0, len(ids) - 1, context - 1)
            windows = [ids[start : start + context] for start in starts]
            scores = self._score(windows) if windows else []
            found.append(float(sum(s.sum(dtype=np.float64) for s in scores)))
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns continuations that end before one of the strings in `until`."""
        texts = []
        for batch in _batches(requests):
            rows, samples = [], []
            arguments_of: list[Any] = [request.args for request in batch]
            for context, arguments in arguments_of:
                sample = _sample(arguments, self._tokenizer)
                room = self._config.context_length - sample.max_new_tokens
                if room < 1:
                    raise ValueError(
                        f"max_gen_toks is {sample.max_new_tokens}: the model's context "
                        f"is {self._config.context_length}"
                    )
                rows.append(self._tokenizer.encode_prompt(context)[-room:])
                samples.append(sample)
            result = generate(
                *(self._config, self._params, rows, samples),
                num_tokens=self._tokenizer.vocab_size,
                token_bytes=self._tokenizer.token_bytes,
            )
            for row, sample in zip(result.rows, samples, strict=True):
                text = self._tokenizer.decode(row)
                texts.append(until_stop(text, sample.stop_strings))
        return texts

    def _score(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return score(
            *(self._config, self._params, rows), num_tokens=self._tokenizer.vocab_size
        )

    def _prefix_id(self) -> int:
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        prefix = eos if bos is None else bos
        if prefix is None:
            raise ValueError("this task needs a tokenizer with a bos or eos token")
        return prefix


def _sample(arguments: dict[str, Any], tokenizer: Tokenizer) -> SampleConfig:
    """Turns the harness' settings into a config; refuses those that it lacks."""
    known = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
    unknown = set(arguments) - known
    if unknown:
        raise ValueError(f"generation settings that jaxlm lacks: {sorted(unknown)}")
    until = arguments.get("until") or ()
    sample = SampleConfig(
        max_new_tokens=arguments.get("max_gen_toks", 256),
        temperature=0.0,
        stop_ids=tokenizer.stop_ids,
        stop_strings=(until,) if isinstance(until, str) else tuple(until),
    )
    if not arguments.get("do_sample", False):
        return sample
    return dataclasses.replace(
        sample,
        temperature=float(arguments.get("temperature", 1.0)),
        top_k=arguments.get("top_k", 0),
        top_p=float(arguments.get("top_p", 1.0)),
    )


def _batches(requests: list[Instance]) -> Iterable[list[Instance]]:
    for first in range(0, len(requests), _ROWS):
        yield requests[first : first + _ROWS]
