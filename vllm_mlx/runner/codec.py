"""Pages and checkpoints as bytes and back, bit for bit.

A page is, layer by layer, its part of each array of the pool: keys, values, and the scales of both where they are
quantised, heads first. A checkpoint is 8 bytes that say how long its description is (little-endian), the description
(msgpack), and the arrays one after the other. Whoever stores them adds what proves that they are whole, and of this
model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import mlx.core as mx
import msgspec
import numpy as np

from vllm_mlx.runner.checkpoints import Checkpoint

VERSION = 1
"""Of both forms."""
WORD = mx.uint32
"""Pages are moved as words: a page has 32 tokens, so each part of it is a whole number of them."""
LENGTH_BYTES = 8
DTYPES = {
    str(dtype).removeprefix("mlx.core."): dtype
    for dtype in (
        mx.bfloat16,
        mx.float16,
        mx.float32,
        mx.bool_,
        mx.uint8,
        mx.uint16,
        mx.uint32,
        mx.uint64,
        mx.int8,
        mx.int16,
        mx.int32,
        mx.int64,
    )
}
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""By element size, what stands for types that numpy may not know."""


class PagePart(msgspec.Struct, frozen=True):
    """What one array of a layer's pool has of a page."""

    heads: int
    elements: int
    """Of one head."""
    dtype: mx.Dtype

    @property
    def num_words(self) -> int:
        """Words of a page."""
        return self.heads * self.elements * self.dtype.size // WORD.size


Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class StagedParts(msgspec.Struct, frozen=True, eq=False):
    """`core.step.Staged`: arrays that follow each other, as views of the memory in which they were computed."""

    parts: tuple[Bytes, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def take(self) -> memoryview:
        """The bytes, copied; numpy lets other threads run while it copies."""
        return np.concatenate(self.parts).data


class Exports(msgspec.Struct, frozen=True, eq=False):
    """What a step gives out, while it is still on the device."""

    pages: mx.array | None = None
    """See `join_pages`."""
    checkpoints: tuple[Checkpoint, ...] = ()

    def payloads(self) -> tuple[StagedParts, ...]:
        """The bytes of each page, then of each checkpoint; waits for them, but copies none."""
        pages = () if self.pages is None else [StagedParts((_bytes_of(row),)) for row in np.asarray(self.pages)]
        return (*pages, *(encode_checkpoint(checkpoint) for checkpoint in self.checkpoints))


def join_pages(parts: Iterable[mx.array]) -> mx.array:
    """Words uint32 [pages, words] of all parts, each [heads, pages, elements]."""
    rows = [part.swapaxes(0, 1).reshape(part.shape[1], -1).view(WORD) for part in parts]
    return mx.concatenate(rows, axis=1)


def split_pages(words: mx.array, layout: Sequence[PagePart]) -> list[mx.array]:
    """The parts [heads, pages, elements] that `join_pages` joined."""
    ends = np.cumsum([part.num_words for part in layout]).tolist()
    assert words.shape[1] == ends[-1]
    pieces = [words[:, end - part.num_words : end] for part, end in zip(layout, ends, strict=True)]
    return [
        piece.view(part.dtype).reshape(-1, part.heads, part.elements).swapaxes(0, 1)
        for piece, part in zip(pieces, layout, strict=True)
    ]


def page_words(payloads: Sequence[bytes], *, page_bytes: int) -> mx.array:
    """Words [pages, words] of exported pages.

    Raises:
        ValueError: one of them is no page of `page_bytes`.
    """
    wrong = next((len(payload) for payload in payloads if len(payload) != page_bytes), None)
    if wrong is not None:
        raise ValueError(f"a page of this model takes {page_bytes} bytes, not {wrong}")
    return mx.array(np.frombuffer(b"".join(payloads), np.uint32).reshape(len(payloads), -1))


class _Array(msgspec.Struct, frozen=True, tag="array", array_like=True):
    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)], ...]


class _Value(msgspec.Struct, frozen=True, tag="value", array_like=True):
    value: bool | int | float | str | None


class _List(msgspec.Struct, frozen=True, tag="list", array_like=True):
    items: tuple[_Array | _Value | _List, ...]


_Node = _Array | _Value | _List


def encode_checkpoint(checkpoint: Checkpoint) -> StagedParts:
    """A checkpoint as bytes; waits for its arrays, and holds them.

    Raises:
        ValueError: there is something in it that has no form here.
    """
    arrays: list[Bytes] = []
    description = msgspec.msgpack.encode([_described(layer, arrays) for layer in checkpoint.layers])
    head = len(description).to_bytes(LENGTH_BYTES, "little") + description
    return StagedParts((np.frombuffer(head, np.uint8), *arrays))


def _bytes_of(array: Any) -> Bytes:
    """The bytes of an array, not copied; waits for it. Numpy may not know its type."""
    return np.frombuffer(array, np.uint8)


def decode_checkpoint(payload: bytes) -> Checkpoint:
    """What `encode_checkpoint` was given, tuples as lists.

    Raises:
        ValueError: these are not the bytes of a checkpoint.
    """
    start = LENGTH_BYTES + int.from_bytes(payload[:LENGTH_BYTES], "little")
    if start > len(payload):
        raise ValueError("the checkpoint is cut off")
    try:
        nodes = msgspec.msgpack.decode(payload[LENGTH_BYTES:start], type=tuple[_Array | _Value | _List, ...])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"the checkpoint's description cannot be read: {error}") from error
    reader = _Reader(payload, start)
    layers = tuple(reader.read(node) for node in nodes)
    if reader.at != len(payload):
        raise ValueError(f"the checkpoint has {len(payload) - reader.at} bytes too many")
    return Checkpoint(layers)


def _described(leaf: Any, arrays: list[Bytes]) -> _Node:
    """What `leaf` is; the bytes of what it has are added to `arrays`."""
    if isinstance(leaf, mx.array):
        arrays.append(_bytes_of(leaf))
        return _Array(str(leaf.dtype).removeprefix("mlx.core."), tuple(leaf.shape))
    if isinstance(leaf, list | tuple):
        return _List(tuple(_described(item, arrays) for item in leaf))
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return _Value(leaf)
    raise ValueError(f"a cache with a {type(leaf).__name__} in its state cannot be stored")


class _Reader:
    """Takes arrays from a payload, one after the other."""

    def __init__(self, payload: bytes, start: int) -> None:
        self._payload = payload
        self.at = start

    def read(self, node: _Node) -> Any:
        """What `node` describes.

        Raises:
            ValueError: the payload ends too early, or the type is unknown.
        """
        if isinstance(node, _List):
            return [self.read(item) for item in node.items]
        return self._array(node) if isinstance(node, _Array) else node.value

    def _array(self, node: _Array) -> mx.array:
        dtype = DTYPES.get(node.dtype)
        if dtype is None:
            raise ValueError(f"the checkpoint has arrays of an unknown type, {node.dtype!r}")
        count = math.prod(node.shape)
        if self.at + count * dtype.size > len(self._payload):
            raise ValueError("the checkpoint is cut off")
        raw = np.frombuffer(self._payload, RAW[dtype.size], count, self.at)
        self.at += raw.nbytes
        return mx.array(raw).view(dtype).reshape(node.shape)
