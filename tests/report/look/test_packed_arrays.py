"""Arrays come back as they were."""

import base64
import gzip
import json
from dataclasses import dataclass

import numpy as np

from jaxlm.report.look.packed_arrays import packed


@dataclass
class Pair:
    first: np.ndarray
    second: dict


def test_arrays_come_back():
    arrays = [
        np.array([[1.5, -2.0], [np.nan, 3e38]], np.float32),
        np.array([1, 2, 3], np.float16),
        np.array([[7, -9]], np.int32).T,
    ]
    value, text = packed(Pair(arrays[0], {"a": [arrays[1], "b"], 5: arrays[2]}))
    value = json.loads(json.dumps(value))
    data = gzip.decompress(base64.b64decode(text))
    found = [value["first"], value["second"]["a"][0], value["second"]["5"]]
    assert value["second"]["a"][1] == "b"
    for array, entry in zip(arrays, found, strict=True):
        dtype, shape, start = entry["array"]
        back = np.frombuffer(data, dtype, array.size, start).reshape(shape)
        assert start % 4 == 0 and dtype == array.dtype
        np.testing.assert_array_equal(back, array)
