"""Reads GGUF files: the header with every bound checked, tensors as maps of the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_mlx.core.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q8_0": (32, 34),
    "Q6_K": (256, 210),
}
"""Types that can be read: values per block, bytes per block."""


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor of a file. `shape` has the rows first, as in numpy; the last dimension is contiguous."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    """Position of the first byte in the file."""
    size_bytes: int


class GgufFile(msgspec.Struct, frozen=True):
    """A parsed header. `header_bytes` is where the tensors begin."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    header_bytes: int

    def refuse(self, what: str) -> ModelError:
        """The error that says what is wrong with this file."""
        return ModelError(f"{self.path}: {what}")


def read_header(path: Path) -> GgufFile:
    """Metadata and tensor list of a GGUF file.

    Raises ModelError if the file is not GGUF, truncated, damaged, or has a tensor of a type that cannot be read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except (_Damaged, ValueError) as error:
        raise ModelError(f"{path}: is not a whole GGUF file ({error}); download it again.") from error


def tensor_rows(file: GgufFile, info: TensorInfo) -> np.ndarray:
    """The raw bytes of a tensor, uint8 `[rows, bytes per row]`, mapped from the file."""
    import numpy as np

    rows = math.prod(info.shape[:-1])
    raw = np.memmap(file.path, dtype=np.uint8, mode="r", offset=info.offset, shape=(info.size_bytes,))
    return raw.reshape(rows, info.size_bytes // rows)


class _Damaged(Exception):
    """The bytes do not follow the format."""


class _Cursor:
    """Reads values one after the other; never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> int:
        """Move over `size` bytes and return where they begin."""
        start = self.at
        if size > len(self.data) - start:
            raise _Damaged("it ends too early")
        self.at += size
        return start

    def scalar(self, code: str) -> Any:
        start = self.take(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.data, start)[0]

    def text(self) -> str:
        size = self.scalar("Q")
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array()
        if kind not in SCALARS:
            raise _Damaged(f"unknown value type {kind}")
        return self.scalar(SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == STRING:
            if count * 8 > len(self.data) - self.at:
                raise _Damaged("it ends too early")
            return [self.text() for _ in range(count)]
        if kind not in SCALARS:
            raise _Damaged(f"unknown array type {kind}")
        width = struct.calcsize("<" + SCALARS[kind])
        start = self.take(count * width)
        return list(struct.unpack_from(f"<{count}{SCALARS[kind]}", self.data, start))


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    if data[:4] != b"GGUF":
        raise _Damaged("it does not begin with GGUF")
    cursor = _Cursor(data)
    cursor.take(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        big_endian = version & 0xFFFF == 0
        raise _Damaged("it is big-endian" if big_endian else f"version {version} is not 2 or 3")
    num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_fields):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar("I"))
    raw = [_tensor_entry(cursor) for _ in range(num_tensors)]
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise _Damaged(f"general.alignment is {align!r}")
    begin = -(-cursor.at // align) * align
    tensors = {name: _tensor_info(path, name, entry, begin=begin, size=len(data)) for name, *entry in raw}
    if len(tensors) != num_tensors:
        raise _Damaged("two tensors have the same name")
    return GgufFile(path=path, metadata=metadata, tensors=tensors, header_bytes=begin)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = cursor.text(), cursor.scalar("I")
    if not 1 <= rank <= 4:
        raise _Damaged(f"tensor {name} has {rank} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(rank))
    return name, shape[::-1], cursor.scalar("I"), cursor.scalar("Q")


def _tensor_info(path: Path, name: str, entry: list[Any], *, begin: int, size: int) -> TensorInfo:
    shape, type_id, offset = entry
    type_name = TYPE_NAMES.get(type_id, f"number {type_id}")
    if type_name not in BLOCKS:
        raise ModelError(
            f"{path}: tensor {name} is of type {type_name}, which cannot be loaded; take a file of the model "
            f"in {', '.join(BLOCKS)}, or its safetensors version."
        )
    values, width = BLOCKS[type_name]
    if min(shape) < 1 or shape[-1] % values:
        raise _Damaged(f"tensor {name} has the shape {list(shape)}")
    size_bytes = math.prod(shape) // values * width
    if begin + offset + size_bytes > size:
        raise _Damaged(f"it ends before tensor {name}")
    return TensorInfo(name=name, type_name=type_name, shape=shape, offset=begin + offset, size_bytes=size_bytes)
