"""The file of block sizes measured on this machine.

`tuning.py` measures them; each implementation reads its own settings.
"""

import contextlib
import dataclasses
import fcntl
import json
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.files.durable import replacing
from jaxlm.files.strict_json import parse_object
from jaxlm.files.user_cache import user_cache
from jaxlm.ops.attention.request import target
from jaxlm.terminal.printable import one_line

T = TypeVar("T", bound=Any)


def settings_file() -> Path:
    """Returns the path of the file, in the user's cache folder."""
    return user_cache() / "attention.json"


def settings_key(implementation: str, q: Array | jax.ShapeDtypeStruct) -> str:
    """Returns the key of a measurement: implementation, device, head_dim and dtype."""
    head_dim, dtype = q.shape[-1], jnp.dtype(q.dtype).name
    return f"{implementation}, {target()[1]}, {head_dim}, {dtype}"


def measured(key: str, default: T) -> T:
    """Returns `default`, updated with the fields measured for `key`.

    Raises:
      ValueError: if the file is not JSON, names unknown fields, or has a size that is
        not a positive integer.
    """
    try:
        path = settings_file()
        text = path.read_bytes()
    except OSError:  # Nothing was measured.
        return default
    try:
        fields = parse_object(text, "it").get(key, {})
        found = dataclasses.replace(default, **fields)
        if not all(type(size) is int and size > 0 for size in fields.values()):
            raise TypeError(f"{key!r} has a size that is not a whole number above 0")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: {one_line(str(error))}; delete it, and run `jaxlm tune "
            "attention` again"
        ) from None
    return found


def record(key: str, settings: Any, fields: tuple[str, ...]) -> Path:
    """Writes the fields measured for `key`, keeps the rest, and returns the path."""
    path = settings_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "wb") as lock:
        # Another process may record what it has measured at the same time.
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        old = parse_object(path.read_bytes(), str(path)) if path.is_file() else {}
        old[key] = {**old.get(key, {}), **{f: getattr(settings, f) for f in fields}}
        with replacing(path) as file:
            file.write(json.dumps(old, indent=1).encode())
    return path
