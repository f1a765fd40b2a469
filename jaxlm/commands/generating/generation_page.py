"""The page of `jaxlm look` for a generation of `jaxlm sample`."""

import shlex
import sys
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from jaxlm.config import ModelConfig
from jaxlm.flags.arguments import SampleArguments
from jaxlm.report.look.look_page import write_page
from jaxlm.report.look.make_view import view_of
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params


def write_generation(
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompt: Int[np.ndarray, " n"],
    new: Int[np.ndarray, " m"],
    chosen: SampleArguments,
) -> None:
    """Writes the page of a prompt and a continuation.

    The chosen position is the last of the prompt, which answers with the first new
    token.
    """
    assert chosen.look is not None
    view = view_of(
        model,
        jax.device_get(params),
        tokenizer,
        np.concatenate([prompt, new]),
        num_prompt=len(prompt),
        sample=chosen.sample,
        title=Path(chosen.run or "the newest run").name,
        call=shlex.join(["jaxlm", *sys.argv[1:]]),
    )
    write_page(view, chosen.look)
