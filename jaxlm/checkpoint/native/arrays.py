"""Writes and reads trees of arrays with Orbax, one folder for each tree.

A tree is stored as nested dicts keyed by the components of its path names, so the files
do not depend on the classes that hold the arrays: an optax state is restored into the
structure of the abstract state, including empty and masked nodes.
"""

import asyncio
import glob
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxlm import tree
from jaxlm.terminal.printable import shown, shown_value

# Path name of an array -> (dtype, shape), as stored in meta.json.
Description = Mapping[str, Sequence[Any]]


def _is_no_echo(record: logging.LogRecord) -> bool:
    """Drops log records of errors that Orbax also raises in the caller."""
    return "_SignalingThread.run() raised an exception" not in str(record.msg)


def new_handler() -> ocp.PyTreeCheckpointHandler:
    """Makes the Orbax object that reads and writes one tree."""
    logging.getLogger("absl").addFilter(_is_no_echo)  # no effect if already added
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (np.ndarray, _NumpyHandler()),
        (jax.Array, handlers.get_type_handler(jax.Array)),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _NumpyHandler(ocp.type_handlers.NumpyHandler):
    async def _background_serialize(self, *args: Any, **kwargs: Any) -> None:
        """Fails when all arrays are written or have failed, not at the first one.

        Otherwise the event loop of the writes is closed when the others fail, and
        TensorStore prints a traceback for each.
        """
        try:
            await super()._background_serialize(*args, **kwargs)
        except Exception:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)
            raise


def flatten(state: Any, where: str) -> dict[str, Any]:
    """Flattens a tree to a dict by path name.

    Raises:
      ValueError: for leaves that are not arrays of numbers, and if two leaves have the
        same path name.
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
                "step (jax.random.fold_in), or save its jax.random.key_data"
            )
        is_number = leaf.dtype == bool or jnp.issubdtype(leaf.dtype, np.number)
        if not is_number or isinstance(leaf, np.ma.MaskedArray):
            kind = "masked array" if is_number else f"array of {leaf.dtype}"
            raise ValueError(f"{where}/{name} is a {kind}: a checkpoint holds numbers")
    return flat


def describe(flat: Mapping[str, Any]) -> Description:
    """Returns the dtype and shape of each array, for JSON."""
    return {
        name: (jnp.dtype(leaf.dtype).name, list(leaf.shape))
        for name, leaf in flat.items()
    }


def check_description(description: Any, where: str) -> None:
    """Raises ValueError for anything but dtypes and shapes by name."""
    if not isinstance(description, dict):
        raise ValueError(f"{where} is {shown_value(description)}")
    for name, entry in description.items():
        try:
            dtype, shape = entry
            good = isinstance(dtype, str) and jnp.dtype(dtype).itemsize
            good = good and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(f"{where}: {shown(name)} is {shown_value(entry)}")


def abstract(description: Description, shardings: Mapping[str, Any]) -> dict[str, Any]:
    """Makes `jax.ShapeDtypeStruct`s by path name, with shardings where given."""
    return {
        name: jax.ShapeDtypeStruct(
            tuple(shape), jnp.dtype(dtype), sharding=shardings.get(name)
        )
        for name, (dtype, shape) in description.items()
    }


def differences(stored: Description, wanted: Description) -> list[str]:
    """Describes each array that one side lacks or whose dtype or shape differs."""
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
    """Returns the size of the arrays in bytes, before compression."""
    return sum(
        math.prod(shape) * jnp.dtype(dtype).itemsize
        for dtype, shape in description.values()
    )


def own(flat: dict[str, Any]) -> dict[str, Any]:
    """Copies the arrays that the caller could still change in place.

    The copies have this machine's order of bytes, in which arrays are read back.
    """
    return {
        name: x if isinstance(x, jax.Array) else np.array(x, x.dtype.newbyteorder("="))
        for name, x in flat.items()
    }


def on_host(state: Any) -> Any | None:
    """Returns the arrays as NumPy, or None if other processes hold parts of them.

    On CPU these are views. The jax arrays may still be donated or deleted: JAX does not
    reuse memory that has a view.
    """
    leaves = jax.tree.leaves(state)
    if not all(getattr(x, "is_fully_addressable", True) for x in leaves):
        return None
    return jax.tree.map(np.asarray, state)


def on_one_device(state: Any) -> bool:
    """Returns whether no array is sharded or replicated over several devices."""
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
    """Copies arrays to the host and starts writing them, each item into its folder.

    Returns:
      Futures of the writes. From now on the arrays may be donated or deleted; for
      arrays on CPU see `on_host`.
    """
    futures: list[Any] = []
    for item, flat in state.items():
        if flat:  # Orbax rejects a tree without arrays
            saved = ocp.args.PyTreeSave(tree.nest(flat))
            futures += await handler.async_save(_path(folder / item), args=saved) or []
    return futures


def wait_for_writes(futures: Iterable[Any]) -> None:
    """Waits until all writes have ended; raises the first of their errors."""
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
    """Merges what the processes have written; call it when all have finished."""
    for item, description in items.items():
        if description:
            handler.finalize(_path(folder / item))
            # Where Orbax finds nothing to merge, it only warns.
            assert (folder / item / "manifest.ocdbt").is_file(), f"{item}: no manifest"


class _Path(type(epath.Path())):
    """A path whose `glob` takes only its argument for a pattern, not `RUN[1]`."""

    def glob(self, pattern: str) -> "Iterator[_Path]":
        for name in glob.glob(pattern, root_dir=self):
            yield self / name


def _path(folder: Path) -> epath.Path:
    return _Path(folder.absolute())


def read(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays by path name, onto the shardings of `wanted`.

    Args:
      folder: an item folder that `start_writes` has written.
      wanted: shape, dtype and `sharding` of every stored array; an array without a
        sharding is put on the default device, uncommitted (JAX may move it), unless JAX
        would narrow it: NumPy's of 64 bits stay NumPy's.

    Raises:
      ValueError: if the files have other arrays; and what Orbax raises for damage.
    """
    if not wanted:
        return {}
    restore_args = {name: _restore_args(leaf) for name, leaf in wanted.items()}
    handler = new_handler()
    stored = tree.flatten(handler.metadata(_path(folder)).tree)
    # Where they differ, Orbax casts in silence, or its threads print tracebacks.
    if lines := differences(describe(stored), describe(wanted)):
        raise ValueError(lines[0])
    restored = handler.restore(
        _path(folder),
        args=ocp.args.PyTreeRestore(
            item=tree.nest(
                {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in wanted.items()}
            ),
            restore_args=tree.nest(restore_args),
        ),
    )
    # NumPy arrays are copied: XLA must own memory that it may overwrite.
    return {
        name: jnp.array(leaf) if _is_for_jax(leaf) else leaf
        for name, leaf in tree.flatten(restored).items()
    }


def _is_for_jax(leaf: Any) -> bool:
    narrowed = jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
    return not isinstance(leaf, jax.Array) and not narrowed


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=sharding, global_shape=tuple(leaf.shape)
    )
