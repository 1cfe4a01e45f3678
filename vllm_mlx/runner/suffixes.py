"""Chunks behind prefixes that are in pages already, several sequences in one forward pass on a GPU.

When many requests go on from one long prefix, what each adds is short: computed one by one, a GPU waits for its host.
Here they are put side by side and padded; the pages before them are read as a rectangle, and a mask hides what is not
a row's own. That holds for models whose layers are all in pages that are not quantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vllm_mlx.core.step import PrefillRow
from vllm_mlx.runner.geometry import PaddedChunks
from vllm_mlx.runner.head import WantedPositions
from vllm_mlx.runner.kernel_pages import KernelPages, KernelPool
from vllm_mlx.runner.layers import PAGE_SIZE, ModelLayers, narrower

MAX_TOGETHER = 8
MAX_TOKENS_TOGETHER = 1024
"""Of the chunks, padding included: beyond that, a GPU is busy with one chunk as it is."""
MAX_READ_TOGETHER = 1 << 16
"""Tokens of the prefixes, padding included: each layer's are copied once."""


class SuffixPlace:
    """Where the chunks stand; padded rows and tokens are written to page 0 and seen by nobody."""

    def __init__(self, rows: Sequence[PrefillRow]) -> None:
        starts = np.array([row.start for row in rows], np.int32)
        size, num_pages = max(len(row.token_ids) for row in rows), -(-int(starts.max()) // PAGE_SIZE)
        table = np.zeros((len(rows), num_pages), np.int32)
        for i, row in enumerate(rows):
            own = row.page_ids[: -(-row.start // PAGE_SIZE)]
            table[i, : len(own)] = own
        self.chunks = PaddedChunks(rows, num_rows=len(rows), length=size)
        self.offset = mx.array(starts)
        self.table = mx.array(table)
        self._num_read = num_pages * PAGE_SIZE
        self._size = size
        self._masks: dict[int | None, mx.array] = {}

    def mask(self, window: int | None) -> mx.array:
        """Boolean [rows, 1, tokens, tokens of the pages and then of the chunk]."""
        if window not in self._masks:
            starts, chunk = self.offset[:, None, None], mx.arange(self._size)
            queries = starts + chunk[None, :, None]
            read = mx.arange(self._num_read)[None, None]
            keys = mx.concatenate(
                [mx.broadcast_to(read, (starts.shape[0], 1, self._num_read)), starts + chunk[None, None]], axis=-1
            )
            is_chunk = mx.arange(keys.shape[-1]) >= self._num_read
            seen = (keys <= queries) & (is_chunk | (keys < starts))
            self._masks[window] = (seen if window is None else seen & (keys > queries - window))[:, None]
        return self._masks[window]


class SuffixView:
    """A paged layer's cache while such chunks are computed."""

    def __init__(self, pool: KernelPool, place: SuffixPlace) -> None:
        self._pool = pool
        self._place = place
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, tokens, dim]; returns what the pages before hold, and the chunks behind it."""
        before = self._pool.read_rows(self._place.table)
        self._pool.write_slots(self._place.chunks.slots, keys, values)
        keys, values = (
            mx.concatenate([old, new.astype(old.dtype)], axis=2)
            for old, new in zip(before, (keys, values), strict=True)
        )
        return keys, values

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Always an array: rows differ."""
        return self._place.mask(narrower(self._pool.window, window_size))


def groups(rows: Sequence[PrefillRow]) -> list[tuple[PrefillRow, ...]]:
    """Chunks that are worth computing together, those with prefixes of like length; each group has several."""
    ordered = sorted((row for row in rows if row.start and row.samples), key=lambda row: row.start)
    found: list[tuple[PrefillRow, ...]] = []
    while ordered:
        count = 1
        while count < min(MAX_TOGETHER, len(ordered)) and _fit(ordered[: count + 1]):
            count += 1
        if count > 1:
            found.append(tuple(ordered[:count]))
        ordered = ordered[count:]
    return found


def logits(
    model: nn.Module, layers: ModelLayers, pages: KernelPages, wanted: WantedPositions, rows: Sequence[PrefillRow]
) -> mx.array:
    """Logits [rows, vocab] behind the last tokens of the chunks of a group."""
    place = SuffixPlace(rows)
    with wanted.at(place.chunks.lasts):
        views = layers.fold([SuffixView(pool, place) for pool in pages.pools])
        return wanted.of(model(place.chunks.token_ids, cache=views))[:, 0]


def _fit(rows: Sequence[PrefillRow]) -> bool:
    size, start = max(len(row.token_ids) for row in rows), max(row.start for row in rows)
    return len(rows) * size <= MAX_TOKENS_TOGETHER and len(rows) * start <= MAX_READ_TOGETHER
