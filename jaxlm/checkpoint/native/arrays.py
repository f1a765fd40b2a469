"""Trees of arrays to and from Orbax, one folder a tree.

A tree is stored as nested dicts whose keys are the parts of its path names, so what is
on disk does not depend on the classes that hold the arrays: an optax state comes back
into the structure of the abstract state, empty and masked nodes included.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxlm import tree

# Name of an array -> (dtype, shape), as meta.json holds it.
Description = Mapping[str, Sequence[Any]]


class _NoEcho(logging.Filter):
    """Drops log records of errors that Orbax also raises to its caller."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a record of a background thread that ended with an exception."""
        return "_SignalingThread.run() raised an exception" not in str(record.msg)


_NO_ECHO = _NoEcho()


def new_handler() -> ocp.PyTreeCheckpointHandler:
    """The part of Orbax that reads and writes one tree."""
    logging.getLogger("absl").addFilter(_NO_ECHO)  # a second time does nothing
    return ocp.PyTreeCheckpointHandler()


def flatten(state: Any, where: str) -> dict[str, Any]:
    """Leaves by path name.

    Raises:
      ValueError: for leaves that are not arrays of numbers, and when two leaves have
        the same path name.
    """
    flat = tree.flatten(state)
    if len(flat) != len(jax.tree.leaves(state)):
        raise ValueError(f"{where}: two arrays have the same path name")
    for name, leaf in flat.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(
                f"{where}/{name} is a {type(leaf).__name__}: a checkpoint holds arrays"
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{where}/{name} is a random key: derive keys from the seed and the "
                "step (jax.random.fold_in), or keep jax.random.key_data of it"
            )
    return flat


def describe(flat: Mapping[str, Any]) -> Description:
    """Dtype and shape of each array, for JSON."""
    return {
        name: (jnp.dtype(leaf.dtype).name, list(leaf.shape))
        for name, leaf in flat.items()
    }


def abstract(description: Description, shardings: Mapping[str, Any]) -> dict[str, Any]:
    """`jax.ShapeDtypeStruct`s by path name, with the shardings that are given."""
    return {
        name: jax.ShapeDtypeStruct(
            tuple(shape), jnp.dtype(dtype), sharding=shardings.get(name)
        )
        for name, (dtype, shape) in description.items()
    }


def differences(stored: Description, wanted: Description) -> list[str]:
    """A line for each array that only one side has or whose dtype or shape differs."""
    lines = []
    for name in sorted(stored.keys() | wanted.keys()):
        old, new = (
            f"{d[name][0]} {list(d[name][1])}" if name in d else "absent"
            for d in (stored, wanted)
        )
        if old != new:
            lines.append(f"{name} is {old} in the checkpoint and {new} here")
    return lines


def num_bytes(description: Description) -> int:
    """Bytes of the arrays before compression."""
    return sum(
        math.prod(shape) * jnp.dtype(dtype).itemsize
        for dtype, shape in description.values()
    )


def own(flat: dict[str, Any]) -> dict[str, Any]:
    """The arrays, with copies of those that the caller could still change."""
    return {n: x if isinstance(x, jax.Array) else np.array(x) for n, x in flat.items()}


def on_host(state: Any) -> Any | None:
    """The arrays as NumPy, or None when a part of them lies in other processes.

    On CPU these are views. The jax arrays may be donated or deleted all the same: JAX
    does not reuse memory that has a view.
    """
    if not all(
        getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(state)
    ):
        return None
    return jax.tree.map(np.asarray, state)


def on_one_device(state: Any) -> bool:
    """Whether no array is cut or copied over several devices."""
    return all(
        len(x.sharding.device_set) == 1
        for x in jax.tree.leaves(state)
        if isinstance(x, jax.Array)
    )


async def start_writes(
    handler: ocp.PyTreeCheckpointHandler,
    folder: Path,
    state: Mapping[str, Mapping[str, Any]],
) -> list[Any]:
    """Copies arrays to the host and starts writing them, each item into a new folder.

    Returns:
      Futures of the writing. The arrays may be donated or deleted from here on; for
      those on CPU the reason is that of `on_host`.
    """
    futures: list[Any] = []
    for item, flat in state.items():
        if flat:  # Orbax refuses a tree without arrays
            (folder / item).mkdir()
            saved = ocp.args.PyTreeSave(tree.nest(flat))
            futures += await handler.async_save(_path(folder / item), args=saved) or []
    return futures


def wait_for_writes(futures: Iterable[Any]) -> None:
    """Returns when all writing has ended; raises the first of its errors."""
    errors = []
    for future in futures:
        try:
            future.result()
        except Exception as e:
            errors.append(e)
    if errors:
        raise errors[0]


def finish_writes(
    handler: ocp.PyTreeCheckpointHandler, folder: Path, items: Mapping[str, Description]
) -> None:
    """Merges what the processes have written, after all of them have done so."""
    for item, description in items.items():
        if description:
            handler.finalize(_path(folder / item))


def _path(folder: Path) -> epath.Path:
    return epath.Path(folder.absolute())


def read(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by path name, onto the shardings of `wanted`.

    Args:
      folder: what `start_writes` has written.
      wanted: for every stored array its shape, dtype and `sharding`; an array without
        one comes onto the default device, uncommitted (JAX may move it).
    """
    if not wanted:
        return {}
    how = {name: _restore_args(leaf) for name, leaf in wanted.items()}
    restored = new_handler().restore(
        _path(folder),
        args=ocp.args.PyTreeRestore(
            item=tree.nest(
                {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in wanted.items()}
            ),
            restore_args=tree.nest(how),
        ),
    )
    # NumPy arrays are copied: XLA must own what it may overwrite.
    return {
        name: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
        for name, leaf in tree.flatten(restored).items()
    }


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=sharding, global_shape=tuple(leaf.shape)
    )
