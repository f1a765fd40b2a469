"""How much memory a device has."""

import os
from pathlib import Path

import jax

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_memory() -> int:
    """Returns the bytes that a device has; CPU devices share those of the machine."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.is_file():
        text = _CGROUP_LIMIT.read_text().strip()
        total = min(total, int(text) if text.isdecimal() else total)
    return total // jax.local_device_count()


def gib(num_bytes: int) -> str:
    """Formats bytes in GiB with three digits."""
    return f"{num_bytes / 2**30:,.3g} GiB"
