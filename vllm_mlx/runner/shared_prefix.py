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
from vllm_mlx.runner.geometry import PaddedChunks, additive
from vllm_mlx.runner.kernel_pages import KernelPool
from vllm_mlx.runner.layers import PAGE_SIZE, Fetching, narrower
from vllm_mlx.runner.staging import Send

CHUNK_MULTIPLE = 16
MIN_KEYS_MULTIPLE = 256
KEYS_STEPS = 8
"""Chunks are padded to a multiple, their number to a power of two, and all the keys that are read to an eighth of the
power of two below them: on CUDA, attention is planned for each shape anew, 50 to 100 ms a shape, and with a mask it has
no fast kernel for odd ones."""


class SharedPrefix:
    """The pages that all chunks go on from, and those that each row has behind them.

    The keys are what these pages hold, one after the other, then padding. Padded rows come last.
    """

    def __init__(self, rows: Sequence[PrefillRow], *, send: Send = mx.array) -> None:
        self.offset = rows[0].start
        assert all(row.start == self.offset for row in rows)
        num_pages, tail = divmod(self.offset, PAGE_SIZE)
        num_rows, size, num_groups = padded_count(rows), padded_size(rows), len(rows[0].tables)
        num_own = -(-(tail + size) // PAGE_SIZE)
        self.chunks = PaddedChunks(rows, num_rows=num_rows, length=size, num_groups=num_groups, send=send)
        self.num_keys = padded_keys((num_pages + num_rows * num_own) * PAGE_SIZE)
        tables = np.zeros((num_groups, 1, self.num_keys // PAGE_SIZE), np.int32)
        for group, shared in enumerate(rows[0].tables):
            tables[group, 0, :num_pages] = shared[:num_pages]
            for i, row in enumerate(rows):
                own = row.tables[group][num_pages : num_pages + num_own]
                begin = num_pages + i * num_own
                tables[group, 0, begin : begin + len(own)] = own
        self.tables = [send(table) for table in tables]
        """Of each group of layers, int32 [1, pages]. Pages that no window shows any more are page 0, and hidden."""
        self._num_shared, self._num_own = num_pages * PAGE_SIZE, num_own * PAGE_SIZE
        self._num_rows, self._size = num_rows, size
        self._masks: dict[tuple[int | None, mx.Dtype], mx.array] = {}

    def mask(self, window: int | None, dtype: mx.Dtype) -> mx.array:
        """What is added to the scores, [rows x tokens, keys]: zero where a query may look."""
        if window is not None and self.offset + self._size <= window:
            window = None
        if (window, dtype) not in self._masks:
            behind = mx.arange(self.num_keys) - self._num_shared
            row = mx.where(behind < 0, -1, behind // self._num_own)
            positions = self._num_shared + mx.where(behind < 0, behind, behind % self._num_own)
            query_row = mx.repeat(mx.arange(self._num_rows), self._size)[:, None]
            query = mx.tile(self.offset + mx.arange(self._size), self._num_rows)[:, None]
            seen = ((row < 0) | (row == query_row)) & (positions <= query)
            if window is not None:
                seen = seen & (positions > query - window)
            self._masks[window, dtype] = additive(seen, dtype)
        return self._masks[window, dtype]


class SharedPrefixView(Fetching):
    """A paged layer's cache while chunks behind a shared prefix are computed; it does the attention itself."""

    def __init__(self, pool: KernelPool, place: SharedPrefix) -> None:
        self._pool = pool
        self._place = place
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, tokens, dim]; returns [1, heads, keys, dim]: all that any of the chunks looks at."""
        place, group = self._place, self._pool.group
        self._pool.write_slots(place.chunks.slots[group], keys, values)
        self.fetched = self._pool.read_rows(place.tables[group])
        return self.fetched

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """See SharedPrefix. Models that ask for arrays of another kind are not served through pages on a GPU."""
        assert not return_array
        return self._place.mask(narrower(self._pool.window, window_size), self._pool.dtype)

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attention [rows, heads, tokens, dim], in the type of `queries`."""
        num_rows, heads, size, dim = queries.shape
        in_a_row = queries.astype(keys.dtype).swapaxes(0, 1).reshape(1, heads, num_rows * size, dim)
        out = mx.fast.scaled_dot_product_attention(in_a_row, keys, values, scale=scale, mask=mask, sinks=sinks)
        return out.reshape(heads, num_rows, size, -1).swapaxes(0, 1).astype(queries.dtype)


def padded_count(rows: Sequence[PrefillRow]) -> int:
    """Number of chunks, padded."""
    return 1 << (len(rows) - 1).bit_length()


def padded_size(rows: Sequence[PrefillRow]) -> int:
    """Tokens of the longest chunk, padded."""
    return -(-max(len(row.token_ids) for row in rows) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def padded_keys(num_keys: int, *, steps: int = KEYS_STEPS) -> int:
    """Number of keys, padded: to one of so many steps from a power of two to the next."""
    multiple = max(MIN_KEYS_MULTIPLE, (1 << num_keys.bit_length() - 1) // steps)
    return -(-num_keys // multiple) * multiple
