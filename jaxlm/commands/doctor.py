"""Show versions, devices, and the attention that a config would use."""

import platform
import textwrap
from collections.abc import Iterator
from importlib.metadata import version

import jax
import numpy as np

from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.commands.process import compile_cache_folder
from jaxlm.config import Config
from jaxlm.ops.linear import compute_dtype
from jaxlm.plan.attention_choice import attention_choices
from jaxlm.sharding.mesh import AXES, check_batch, make_mesh, num_slices, ring_hops

PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def main(config: Config, _initial: Checkpoint | None) -> int:
    """Prints a table of what a run with this config would use."""
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    with jax.set_mesh(mesh):
        layout = ("mesh", _wrapped(mesh_layout(mesh.devices)))
        for name, value in [*machine(), layout, *attention(config)]:
            print(f"{name:<20} {value}")
    return 0


def machine() -> Iterator[tuple[str, str]]:
    """Yields versions, devices, the default dtype and the compile cache."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        yield name, version(name)
    devices = jax.devices()
    yield "devices", f"{len(devices)} {devices[0].device_kind} ({devices[0].platform})"
    yield "dtype auto", compute_dtype("auto").name
    try:
        yield "compiled programs", compile_cache_folder()
    except OSError as error:
        yield "compiled programs", f"not kept ({error.strerror})"


def mesh_layout(grid: np.ndarray) -> str:
    """Describes a mesh: its axes, and how far apart the devices along each are.

    Args:
      grid: `Mesh.devices`.
    """
    sizes: dict[str, int] = dict(zip(AXES, grid.shape, strict=True))
    text = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    slices = num_slices(grid.flat)
    if slices > 1:
        text += f"; data goes over {slices} slices"
    hops = ring_hops(grid)
    known = [f"{axis} {n}" for axis, n in hops.items() if n and sizes[axis] > 1]
    if known:
        text += f"; links that a step around an axis takes: {', '.join(known)}"
    return text


def attention(config: Config) -> Iterator[tuple[str, str]]:
    """Yields the attention of each call and kind of layer, and why others declined."""
    model, length = config.model, config.data.sequence_length
    packed = config.data.segment_attention
    rows, context = config.train.batch_size, model.context_length
    calls = {
        f"training {rows} x {length}": (rows, length, None, False),
        f"prefill 1 x {length}": (1, length, context, True),
        f"decode 1 of {context}": (1, 1, context, False),
    }
    for name, (*sizes, is_empty) in calls.items():
        try:
            choices = attention_choices(
                model, *sizes, is_empty=is_empty, segments=packed
            )
        except ValueError as error:
            yield name, _wrapped(str(error))
            continue
        for kind, choice in choices.items():
            yield name, _wrapped(f"{kind} layers: {choice}")


def _wrapped(text: str) -> str:
    """Begins a line after each semicolon, and where 80 columns end."""
    lines: list[str] = []
    for part in text.split("; "):
        lines += textwrap.wrap(part, 80 - 21, subsequent_indent="  ")
    return f"\n{'':<20} ".join(lines)
