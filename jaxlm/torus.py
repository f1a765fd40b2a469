"""The torus that the chips of TPUs are connected in, and the rings along it.

Both what goes around rings and the order of devices in a mesh follow this split.
"""

import math

# Dimensions, by the kind of device.
_DIMENSIONS = {
    "TPU v4": 3,
    "TPU v5": 3,
    "TPU v5 lite": 2,
    "TPU v6 lite": 2,
    "TPU7x": 3,
}
# Kinds whose compilers compute while permutes are under way, and wait for gathers and
# scatters.
_PERMUTES_BESIDE = {"TPU v4", "TPU v5", "TPU v6 lite", "TPU7x"}


def torus_dimensions(device_kind: str) -> int:
    """Returns those of a kind of devices; 1 where all reach each other alike."""
    return _DIMENSIONS.get(device_kind, 1)


def permutes_beside(device_kind: str) -> bool:
    """Returns whether weights go around rings by permutes, beside computation."""
    return device_kind in _PERMUTES_BESIDE


def ring_sizes(count: int, dimensions: int) -> list[int]:
    """Returns the sizes of the rings that devices form, one for each dimension.

    Of the first ring devices next to each other are members. A count that is no power
    of two stays one ring. How long a torus is in each dimension is not known while a
    program is traced, but slices are near cubes: 4 x 4, 4 x 4 x 4, 8 x 4 x 4.
    """
    if count & (count - 1):
        return [count]
    sizes = []
    for dimension in range(dimensions, 0, -1):
        sizes.append(2 ** math.ceil(math.log2(count) / dimension))
        count //= sizes[-1]
    return sizes
