"""Block sizes of the GPU kernels, and which forward kernel runs."""

from dataclasses import dataclass
from typing import Literal

ForwardKernel = Literal["plain", "specialized"]


@dataclass(frozen=True)
class GpuSettings:
    """What may be tuned.

    Blocks are 64, 128, 192 or 256 tokens: matrices in shared memory are 64 numbers
    wide, and one copy has at most 256 rows.

    `buffers` is how many blocks are held at once of what a program loops over: one is
    in use, the others are on their way. The defaults fit an H100 at every head_dim.
    """

    forward: ForwardKernel = "plain"
    """plain: one warpgroup a program (`gpu_flash.py`); specialized: one that copies and
    two that multiply (`specialized_forward.py`), 128 queries whatever `block_queries`.
    """
    block_queries: int = 64
    block_keys: int = 64
    buffers: int = 2
    backward_block_queries: int = 64
    backward_block_keys: int = 64
    backward_buffers: int = 2
    decode_block_keys: int = 64
    decode_splits: int = 0
    """Parts into which the keys of a row are split; 0: enough to fill the card."""
    interpret: bool = False
    """Run on the CPU, in Pallas' interpreter, for tests. It takes f32 too."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if "block" in name and value not in (64, 128, 192, 256):
                raise ValueError(f"{name} is {value}, not 64, 128, 192 or 256")
