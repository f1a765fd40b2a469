"""Block sizes of the GPU kernels, and which forward and backward kernels run."""

from dataclasses import dataclass
from typing import Literal

KernelKind = Literal["plain", "specialized"]


@dataclass(frozen=True)
class GpuSettings:
    """Settings that may be tuned. The defaults fit an H100 at every head_dim.

    Blocks have 64, 128, 192 or 256 tokens: matrices in shared memory are 64 elements
    wide, and one copy has at most 256 rows. `buffers` is the number of shared-memory
    buffers for the blocks that a program loops over: one is in use while the others are
    being filled.

    Raises:
      ValueError: for another block size.
    """

    forward: KernelKind = "plain"
    """plain: one warpgroup per program (`gpu_flash.py`); specialized: one producer and
    two consumer warpgroups (`specialized_forward.py`), with 128 queries per block
    whatever `block_queries` is."""
    block_queries: int = 64
    block_keys: int = 64
    buffers: int = 2
    backward: KernelKind = "plain"
    """plain: as above; specialized: one producer and two consumer warpgroups of 64 rows
    each (`specialized_backward.py`), up to head_dim 128. The blocks are then those that
    they loop over: queries for dk and dv, keys for dq."""
    backward_block_queries: int = 64
    backward_block_keys: int = 64
    backward_buffers: int = 2
    decode_block_keys: int = 64
    decode_splits: int = 0
    """Number of splits of a row's keys; 0: enough to fill the GPU."""
    interpret: bool = False
    """Run on the CPU, in Pallas' interpreter, for tests. It also accepts f32."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if "block" in name and value not in (64, 128, 192, 256):
                raise ValueError(f"{name} is {value}, not 64, 128, 192 or 256")
