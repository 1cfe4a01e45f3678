"""Safetensors files: written one shard at a time, and checked without reading the weights.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_mlx.core.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

MAX_SHARD_BYTES = 1 << 30
MAX_HEADER_BYTES = 100_000_000


class Tensor(msgspec.Struct, frozen=True):
    """One tensor to be written; `load` makes its data when its shard is written."""

    name: str
    dtype: str
    """float32, float16, bfloat16 or uint32."""
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]
    """Bytes of the right number, contiguous."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor on disk."""
        size = {"float32": 4, "float16": 2, "bfloat16": 2, "uint32": 4}[self.dtype]
        for length in self.shape:
            size *= length
        return size


def write_shards(
    folder: Path,
    tensors: list[Tensor],
    *,
    written: Callable[[float], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `tensors` as model*.safetensors, with an index if there is more than one file.

    Holds one shard in memory. `written(fraction)` is called after each tensor that was made.
    """
    groups = _split(tensors, max_shard_bytes)
    total = sum(tensor.size_bytes for tensor in tensors)
    done, weight_map = 0, {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        arrays = {}
        for tensor in group:
            arrays[tensor.name] = tensor.load()
            done += tensor.size_bytes
            written(done / total)
        _write(folder / name, group, arrays)
        weight_map.update({tensor.name: name for tensor in group})
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def check_file(path: Path) -> None:
    """Raise ModelError if the file is not a whole safetensors file. Reads the header only."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            fits = length <= min(size - 8, MAX_HEADER_BYTES)
            header = json.loads(file.read(length)) if fits else None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError:
        header = None
    if head.startswith(b"version "):
        raise ModelError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in that folder.")
    end = _data_end(header)
    if end is None or 8 + length + end != size:
        raise ModelError(f"{path}: is truncated or not a safetensors file; download the model again.")


def _data_end(header: object) -> int | None:
    """Number of data bytes that a header promises; None if it is not a header."""
    if not isinstance(header, dict):
        return None
    try:
        return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (KeyError, IndexError, TypeError):
        return None


def _split(tensors: list[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.size_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.size_bytes
    return groups


def _write(path: Path, tensors: list[Tensor], arrays: dict[str, np.ndarray]) -> None:
    from safetensors import SafetensorError, TensorSpec, serialize_file

    specs = {}
    for tensor in tensors:
        array = arrays[tensor.name]
        if array.nbytes != tensor.size_bytes:
            raise ValueError(f"{tensor.name}: {array.nbytes} bytes made, {tensor.size_bytes} expected")
        specs[tensor.name] = TensorSpec(
            dtype=tensor.dtype, shape=list(tensor.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
    try:
        serialize_file(specs, str(path), {"format": "mlx"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
    path.chmod(0o644)  # the library makes it private, but a cache may be shared
