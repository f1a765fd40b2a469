"""Look inside a model while it reads a text."""

import dataclasses
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Float

from jaxlm.checkpoint.load import load_onto_mesh, open_checkpoint
from jaxlm.checkpoint.native.run_folder import newest_run
from jaxlm.commands.process import use_compile_cache
from jaxlm.config import ModelConfig
from jaxlm.files.durable import check_room_for
from jaxlm.flags.arguments import LookArguments
from jaxlm.interp.jacobian_lens import (
    fit_jacobian_lens,
    read_jacobian_lens,
    write_jacobian_lens,
)
from jaxlm.report.look.look_page import write_page
from jaxlm.report.look.make_view import view_of
from jaxlm.report.look.terminal_view import print_view
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.terminal.progress import Waiting
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

# Of the text that a lens is made from.
_LENS_ROWS, _LENS_LENGTH = 4, 128


def main(chosen: LookArguments) -> int:
    """Writes the page and prints its path, or prints the view in short."""
    use_compile_cache()
    run = chosen.run
    if run is None:
        run = newest_run()
        print(f"looking inside {run}, the newest run", file=sys.stderr, flush=True)
    checkpoint = open_checkpoint(run)
    model = checkpoint.config
    if chosen.dtype is not None:
        model = dataclasses.replace(model, dtype=chosen.dtype)
    tokenizer = checkpoint.tokenizer()
    prompt, against = tokenizer.encode_prompt(chosen.prompt), None
    if chosen.against is not None:
        against = tokenizer.encode_prompt(chosen.against)
    rows = None
    if chosen.lens_text is not None:
        rows = _lens_rows(chosen.lens_text, model, tokenizer)
    # One row is not divided over devices: the weights are, and the compiler follows.
    mesh = make_mesh_of_size(chosen.mesh)
    mesh = Mesh(mesh.devices, mesh.axis_names, (AxisType.Auto,) * mesh.devices.ndim)
    with Waiting("loading the model"), jax.set_mesh(mesh):
        params = load_onto_mesh(checkpoint)
    jacobian = None
    if chosen.lens is not None:
        jacobian = _lens(model, params, rows, chosen.lens)
    call = ["jaxlm", "look", str(run), "--prompt", chosen.prompt]
    if chosen.against is not None:
        call += ["--against", chosen.against]
    if chosen.lens is not None:
        call += ["--lens", str(chosen.lens)]
    with Waiting("looking inside"):
        view = view_of(
            *(model, params, tokenizer, prompt),
            against=against,
            jacobian=jacobian,
            title=Path(run).name,
            call=shlex.join(call),
        )
    if chosen.terminal:
        print_view(view)
    else:
        print(write_page(view, chosen.out))
    return 0


def _lens_rows(path: Path, model: ModelConfig, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the first rows of a text, [R, T].

    Raises:
      ValueError: if it cannot be read, or has less than one row.
    """
    length = min(_LENS_LENGTH, model.context_length)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--lens-text {path}: {error}") from None
    # A token is seldom longer than 64 characters: no more of a large file is read.
    ids = tokenizer.encode(text[: 64 * _LENS_ROWS * length])
    count = min(_LENS_ROWS, len(ids) // length)
    if not count:
        raise ValueError(
            f"--lens-text {path} has {len(ids)} tokens: a lens needs {length} or more"
        )
    return ids[: count * length].reshape(count, length)


def _lens(
    model: ModelConfig, params: Params, rows: np.ndarray | None, path: Path
) -> Float[np.ndarray, "L D D"]:
    """Reads a lens, or makes one from rows and writes it, in place of a lens only."""
    if rows is None:
        return read_jacobian_lens(model, path, params)
    if path.exists():
        read_jacobian_lens(model, path)  # Nothing else is replaced.
    check_room_for(path)
    with Waiting(f"making a lens of {rows.size} tokens"):
        # The first tokens are unlike the others, as `jacobian_lens` says.
        jacobian = fit_jacobian_lens(model, params, rows, skip=rows.shape[1] // 8)
    if path.exists():  # It may have come meanwhile.
        read_jacobian_lens(model, path)
    write_jacobian_lens(path, jacobian, params)
    return jacobian
