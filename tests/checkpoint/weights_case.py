"""Small weight files, good ones and ones built of any parts."""

import json
import struct

import numpy as np

from jaxlm.checkpoint.gguf.gguf_file import read_gguf
from jaxlm.checkpoint.gguf.gguf_writing import write_gguf
from jaxlm.checkpoint.hf.safetensors_file import read_safetensors, write_safetensors
from jaxlm.checkpoint.hf.safetensors_folder import read_folder

HUGE = (1 << 64) - 1
U8, STRING, ARRAY, U32, BOOL = 0, 8, 9, 4, 7
F32, Q4_1, IQ2_XXS = 0, 3, 16


def read_all(path):
    """Opens a file or folder of weights and reads every tensor."""
    if path.is_dir():
        tensors = read_folder(path)
    elif path.suffix == ".gguf":
        tensors = read_gguf(path).tensors
    else:
        tensors = read_safetensors(path)[0]
    return {name: tensor.read() for name, tensor in tensors.items()}


def text(value, length=None):
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content) if length is None else length) + content


def key(name, kind, payload=b""):
    return text(name) + struct.pack("<I", kind) + payload


def array(kind, count, payload=b""):
    return struct.pack("<IQ", kind, count) + payload


def tensor(name, dims, kind=F32, offset=0, num_dims=None):
    num_dims = len(dims) if num_dims is None else num_dims
    sizes = struct.pack(f"<I{len(dims)}Q", num_dims, *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def gguf(keys=(), tensors=(), data=b"", num_keys=None, num_tensors=None, start=None):
    num_tensors = len(tensors) if num_tensors is None else num_tensors
    num_keys = len(keys) if num_keys is None else num_keys
    start = b"GGUF" + struct.pack("<I", 3) if start is None else start
    header = start + struct.pack("<QQ", num_tensors, num_keys)
    header += b"".join([*keys, *tensors])
    return header + bytes(-len(header) % 32) + data


def good_gguf(path):
    metadata = {
        "general.architecture": "llama",
        "texts": [f"token {i}" for i in range(20)],
        "numbers": np.arange(40, dtype=np.int16),
        "flag": True,
    }
    layout = {"a": ((4, 32), "Q8_0"), "b": ((8, 16), "F32"), "c": ((8, 16), "BF16")}
    arrays = {
        "a": np.ones((4, 32), np.float32),
        "b": np.ones((8, 16), np.float32),
        "c": np.ones((8, 16), np.dtype("bfloat16")),
    }
    write_gguf(path, metadata, layout, arrays.__getitem__)


def good_safetensors(path):
    arrays = {
        "a": np.ones((16, 16), np.float32),
        "b": np.zeros((16, 3), np.bool_),
        "c": np.ones((), np.int64),
        "d": np.ones((16, 16), np.dtype("bfloat16")),
    }
    layout = {n: (a.shape, a.dtype) for n, a in arrays.items()}
    write_safetensors(path, layout, arrays.__getitem__)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safe(header, data=bytes(8), length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (
        struct.pack("<Q", len(content) if length is None else length) + content + data
    )
