"""Chunks behind one prefix, held in the very same pages: it is read once for all of them, as one long sequence.

The queries of all rows, one row after the other, attend to the prefix and to their own row's tokens behind it; a mask
hides the other rows'. Read per row, a prefix of thousands of tokens would be copied for each, layer by layer, which
costs more than what a short suffix has to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from vllm_mlx.core.step import PrefillRow
from vllm_mlx.runner.geometry import PaddedChunks
from vllm_mlx.runner.kernel_pages import KernelPool
from vllm_mlx.runner.layers import PAGE_SIZE, narrower

CHUNK_MULTIPLE = 16
MIN_KEYS_MULTIPLE = 256
KEYS_STEPS = 8
"""Chunks are padded to a multiple, their number to a power of two, and all the keys that are read to an eighth of the
power of two below them: on CUDA, attention is planned for each shape anew, 50 to 100 ms a shape, and with a mask it has
no fast kernel for odd ones."""


class SharedPrefix:
    """The pages that all chunks go on from.

    The keys are the tokens of these whole pages, then each row's tokens in its last page, which is not full, with those
    of its chunk; then padding. Padded rows come last.
    """

    def __init__(self, rows: Sequence[PrefillRow]) -> None:
        self.offset = rows[0].start
        assert all(row.start == self.offset for row in rows)
        num_pages, self.tail = divmod(self.offset, PAGE_SIZE)
        num_rows, size = padded_count(rows), padded_size(rows)
        self.chunks = PaddedChunks(rows, num_rows=num_rows, length=size)
        self.num_shared = num_pages * PAGE_SIZE
        self.table = mx.array(np.array([rows[0].page_ids[:num_pages]], np.int32))
        tails = np.zeros((num_rows, 1), np.int32)
        tails[: len(rows), 0] = [row.page_ids[num_pages] for row in rows]
        self.tails = mx.array(tails)
        """Each row's page behind the shared ones, int32 [rows, 1]; read if there is a tail."""
        self._own = self.tail + size
        self.num_keys = _padded_keys(self.num_shared + num_rows * self._own)
        self._num_rows, self._size = num_rows, size
        self._masks: dict[tuple[int | None, mx.Dtype], mx.array] = {}

    def mask(self, window: int | None, dtype: mx.Dtype) -> mx.array:
        """What is added to the scores, [rows x tokens, keys]: zero where a query may look."""
        if window is not None and self.offset + self._size <= window:
            window = None
        if (window, dtype) not in self._masks:
            behind = mx.arange(self.num_keys) - self.num_shared
            row = mx.where(behind < 0, -1, behind // self._own)
            positions = mx.where(behind < 0, mx.arange(self.num_keys), self.num_shared + behind % self._own)
            query_row = mx.repeat(mx.arange(self._num_rows), self._size)[:, None]
            query = mx.tile(self.offset + mx.arange(self._size), self._num_rows)[:, None]
            seen = ((row < 0) | (row == query_row)) & (positions <= query)
            if window is not None:
                seen = seen & (positions > query - window)
            self._masks[window, dtype] = additive(seen, dtype)
        return self._masks[window, dtype]


class SharedPrefixView:
    """A paged layer's cache while chunks behind a shared prefix are computed; it does the attention itself."""

    def __init__(self, pool: KernelPool, place: SharedPrefix) -> None:
        self._pool = pool
        self._place = place
        self._fetched: tuple[mx.array, mx.array] | None = None
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, tokens, dim]; returns [1, heads, keys, dim]: all that any of the chunks looks at."""
        place, pool = self._place, self._pool
        shared = pool.read_rows(place.table)
        own: Sequence[mx.array] = (keys.astype(pool.dtype), values.astype(pool.dtype))
        if place.tail:
            tails = (tail[:, :, : place.tail] for tail in pool.read_rows(place.tails))
            own = [mx.concatenate([tail, new], axis=2) for tail, new in zip(tails, own, strict=True)]
        pool.write_slots(place.chunks.slots, keys, values)
        all_keys, all_values = (self._joined(before, behind) for before, behind in zip(shared, own, strict=True))
        self._fetched = all_keys, all_values
        return self._fetched

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """See SharedPrefix. Models that ask for arrays of another kind are not served through pages on a GPU."""
        assert not return_array
        return self._place.mask(narrower(self._pool.window, window_size), self._pool.dtype)

    def owns(self, keys: Any, values: Any) -> bool:
        """Whether `keys` and `values` are what `update_and_fetch` returned."""
        return self._fetched is not None and keys is self._fetched[0] and values is self._fetched[1]

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attention [rows, heads, tokens, dim], in the type of `queries`."""
        num_rows, heads, size, dim = queries.shape
        in_a_row = queries.astype(keys.dtype).swapaxes(0, 1).reshape(1, heads, num_rows * size, dim)
        out = mx.fast.scaled_dot_product_attention(in_a_row, keys, values, scale=scale, mask=mask, sinks=sinks)
        return out.reshape(heads, num_rows, size, -1).swapaxes(0, 1).astype(queries.dtype)

    def _joined(self, shared: mx.array, own: mx.array) -> mx.array:
        """[1, heads, keys, dim] of the prefix [1, heads, tokens, dim] and the rows' [rows, heads, tokens, dim]."""
        heads, dim = own.shape[1], own.shape[3]
        behind = own.swapaxes(0, 1).reshape(1, heads, -1, dim)
        missing = self._place.num_keys - shared.shape[2] - behind.shape[2]
        padding = [mx.zeros((1, heads, missing, dim), own.dtype)] if missing else []
        return mx.concatenate([shared, behind, *padding], axis=2)


def padded_count(rows: Sequence[PrefillRow]) -> int:
    """Number of chunks, padded."""
    return 1 << (len(rows) - 1).bit_length()


def padded_size(rows: Sequence[PrefillRow]) -> int:
    """Tokens of the longest chunk, padded."""
    return -(-max(len(row.token_ids) for row in rows) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def _padded_keys(num_keys: int) -> int:
    multiple = max(MIN_KEYS_MULTIPLE, (1 << num_keys.bit_length() - 1) // KEYS_STEPS)
    return -(-num_keys // multiple) * multiple


def additive(seen: mx.array, dtype: mx.Dtype) -> mx.array:
    """A boolean mask as what is added to the scores. MLX would make this of it in every layer, for every head."""
    return mx.where(seen, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))
