"""The sizes of the pages of a Parquet column, from the headers of the pages.

pyarrow allocates what the header of a page claims, up to 2 GiB, so that a file of a few
kilobytes can take as much. The metadata at the end of a file need not be true: pyarrow
does not compare them.

Source: parquet.thrift of the Parquet format, and Thrift's compact protocol. A header is
a struct; its fields 2 and 3 are the uncompressed and the compressed size of the page.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

# Larger pages must be less compressible than this: text becomes 3 to 10 times smaller.
# A reader holds a page, and up to a batch of rows that each have all of it.
MAX_PAGE_BYTES = 8 << 20
MAX_RATIO = 20
_MAX_NESTING = 4
# Types of the compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = (*range(1, 9), 12)


def check_pages(file: BinaryIO, chunk: Any) -> None:
    """Checks what the pages of a column chunk need before any of them is read.

    Args:
      file: the Parquet file, opened for reading.
      chunk: its `pyarrow.parquet.ColumnChunkMetaData`.

    Raises:
      ValueError: for a damaged header, and for a page of more than 8 MiB that is
        compressed to less than a twentieth.
    """
    for stored, size in _page_sizes(file, chunk):
        if size > max(MAX_PAGE_BYTES, MAX_RATIO * stored):
            raise ValueError(
                f"a page of {stored} bytes claims {size}, more than {MAX_RATIO} times "
                f"as many: pages that large may have {MAX_PAGE_BYTES}"
            )


def _page_sizes(file: BinaryIO, chunk: Any) -> Iterator[tuple[int, int]]:
    """Yields the compressed and the uncompressed size of each page."""
    offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
    at = min(offset for offset in offsets if offset)
    end = at + chunk.total_compressed_size
    while at < end:
        file.seek(at)
        sizes = _integers(file)
        stored, size = sizes.get(3, -1), sizes.get(2, -1)
        if stored < 0 or size < 0:
            raise ValueError(f"the page at byte {at} has no size")
        yield stored, size
        at = file.tell() + stored


def _integers(file: BinaryIO, depth: int = 0) -> dict[int, int]:
    """Reads a struct, and returns those of its fields that are integers."""
    fields, number = {}, 0
    while head := _byte(file):
        number = number + (head >> 4) if head >> 4 else _zigzag(file)
        kind = head & 15
        if kind in (_I16, _I32, _I64):
            fields[number] = _zigzag(file)
        elif kind in (_BYTE, _DOUBLE):
            file.seek(1 if kind == _BYTE else 8, 1)
        elif kind == _BINARY:
            file.seek(_varint(file), 1)
        elif kind == _STRUCT and depth < _MAX_NESTING:
            _integers(file, depth + 1)
        elif kind not in (_TRUE, _FALSE):  # whose value is the type
            raise ValueError(f"a field of type {kind} in the header of a page")
    return fields


def _byte(file: BinaryIO) -> int:
    data = file.read(1)
    if not data:
        raise ValueError("the header of a page goes beyond the file")
    return data[0]


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while (byte := _byte(file)) & 0x80 and shift < 63:
        value |= (byte & 0x7F) << shift
        shift += 7
    return value | (byte & 0x7F) << shift


def _zigzag(file: BinaryIO) -> int:
    value = _varint(file)
    return value >> 1 ^ -(value & 1)
