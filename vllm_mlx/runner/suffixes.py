"""Chunks behind prefixes that are in pages already, several sequences in one forward pass on a GPU.

When many requests go on from long prefixes, what each adds is short: computed one by one, a GPU waits for its host.
Here they are put side by side and padded. A prefix that all have in common is read once (`shared_prefix.py`); else the
pages before the chunks are read as a rectangle. Rows behind equally many tokens need no more than the causal mask that
attention knows by name, for padding comes last; elsewhere an array hides what is not a row's own. That holds for models
whose layers are all in pages that are not quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vllm_mlx.core.step import PrefillRow
from vllm_mlx.runner.geometry import PaddedChunks, additive
from vllm_mlx.runner.head import WantedPositions
from vllm_mlx.runner.kernel_pages import KernelPages, KernelPool
from vllm_mlx.runner.layers import PAGE_SIZE, ModelLayers, narrower
from vllm_mlx.runner.shared_prefix import SharedPrefix, SharedPrefixView, padded_count, padded_size
from vllm_mlx.runner.staging import Send

MAX_TOGETHER = 8
MAX_TOKENS_TOGETHER = 1024
"""Of the chunks, padding included: beyond that, a GPU is busy with one chunk as it is."""
MAX_READ_TOGETHER = 1 << 16
"""Tokens of the prefixes, padding included: each layer's are copied once."""
PAGES_MULTIPLE = 8
"""What is read of prefixes of different lengths is padded to a multiple, so that few shapes need planning."""
MAX_SHARING = 64
MAX_TOKENS_SHARING = 2048
MAX_SCORES_SHARING = 1 << 26
"""Of chunks behind one prefix, all of whose queries are masked against all keys: the mask has so many elements."""


class SuffixPlace:
    """Where the chunks stand; padded tokens are written to page 0 and seen by nobody."""

    def __init__(self, rows: Sequence[PrefillRow], *, send: Send = mx.array) -> None:
        starts, size = np.array([row.start for row in rows], np.int32), padded_size(rows)
        longest = int(starts.max()) + size
        self._is_even = longest == int(starts.min()) + size
        num_pages, num_groups = -(-longest // PAGE_SIZE), len(rows[0].tables)
        if not self._is_even:
            num_pages = -(-num_pages // PAGES_MULTIPLE) * PAGES_MULTIPLE
        tables = np.zeros((num_groups, len(rows), num_pages), np.int32)
        for i, row in enumerate(rows):
            for group, page_ids in enumerate(row.tables):
                own = page_ids[:num_pages]
                tables[group, i, : len(own)] = own
        self.chunks = PaddedChunks(rows, num_rows=len(rows), length=size, num_groups=num_groups, send=send)
        self.offset = send(starts)
        self.tables = [send(table) for table in tables]
        """Of each group of layers. What a window does not show any more is read from page 0, and hidden."""
        self.num_keys = longest if self._is_even else num_pages * PAGE_SIZE
        """Tokens that are shown to attention; some are no row's own unless all rows have as many."""
        self._size = size
        self._masks: dict[tuple[int | None, mx.Dtype], mx.array] = {}

    def mask(self, window: int | None, dtype: mx.Dtype) -> mx.array | str:
        """'causal', or what is added to the scores, [rows, 1, tokens, keys]."""
        if window is not None and self.num_keys <= window:
            window = None
        if self._is_even and window is None:
            return "causal"
        if (window, dtype) not in self._masks:
            queries = self.offset[:, None, None] + mx.arange(self._size)[:, None]
            keys = mx.arange(self.num_keys)
            seen = keys <= queries
            seen = seen if window is None else seen & (keys > queries - window)
            self._masks[window, dtype] = additive(seen, dtype)[:, None]
        return self._masks[window, dtype]


class SuffixView:
    """A paged layer's cache while such chunks are computed."""

    def __init__(self, pool: KernelPool, place: SuffixPlace) -> None:
        self._pool = pool
        self._place = place
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, tokens, dim]; returns what the pages hold from the first token to the last."""
        place, group = self._place, self._pool.group
        self._pool.write_slots(place.chunks.slots[group], keys, values)
        keys, values = self._pool.read_rows(place.tables[group])
        return keys[:, :, : place.num_keys], values[:, :, : place.num_keys]

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """See SuffixPlace. Models that ask for arrays of another kind are not served through pages on a GPU."""
        assert not return_array
        return self._place.mask(narrower(self._pool.window, window_size), self._pool.dtype)


def groups(rows: Sequence[PrefillRow]) -> list[tuple[PrefillRow, ...]]:
    """Chunks that are worth computing together: those behind one prefix, those with prefixes of one length, the rest.

    Each group has several.
    """
    ordered = sorted((row for row in rows if row.start and row.samples), key=attrgetter("start"))
    by_prefix: dict[tuple[Any, ...], list[PrefillRow]] = {}
    for row in ordered:
        by_prefix.setdefault((row.start, *_whole_pages(row)), []).append(row)
    sharing = [part for members in by_prefix.values() for part in _cut(members, _fit_sharing)]
    parts = [part for part in sharing if len(part) > 1]
    rest = [part[0] for part in sharing if len(part) == 1]
    even = [part for _, members in groupby(rest, attrgetter("start")) for part in _cut(list(members), _fit)]
    rest = [part[0] for part in even if len(part) == 1]
    return [part for part in (*parts, *even, *_cut(rest, _fit)) if len(part) > 1]


def logits(
    model: nn.Module, layers: ModelLayers, pages: KernelPages, wanted: WantedPositions, rows: Sequence[PrefillRow]
) -> mx.array:
    """Logits [rows, vocab] behind the last tokens of the chunks of a group."""
    place = (SharedPrefix if _is_shared(rows) else SuffixPlace)(rows, send=pages.send)
    with wanted.at(place.chunks.lasts):
        views = layers.fold([_view(pool, place) for pool in pages.pools])
        return wanted.of(model(place.chunks.token_ids, cache=views))[: len(rows), 0]


def _view(pool: KernelPool, place: SharedPrefix | SuffixPlace) -> SharedPrefixView | SuffixView:
    return SharedPrefixView(pool, place) if isinstance(place, SharedPrefix) else SuffixView(pool, place)


def _is_shared(rows: Sequence[PrefillRow]) -> bool:
    first = rows[0]
    return first.start >= PAGE_SIZE and all(
        row.start == first.start and _whole_pages(row) == _whole_pages(first) for row in rows
    )


def _whole_pages(row: PrefillRow) -> tuple[tuple[int, ...], ...]:
    """The pages that are full before the chunk begins, in each group of layers."""
    return tuple(page_ids[: row.start // PAGE_SIZE] for page_ids in row.tables)


def _cut(ordered: list[PrefillRow], fit: Callable[[Sequence[PrefillRow]], bool]) -> list[tuple[PrefillRow, ...]]:
    """Rows in order, in parts that can be computed together."""
    parts: list[tuple[PrefillRow, ...]] = []
    while ordered:
        count = 1
        while count < len(ordered) and fit(ordered[: count + 1]):
            count += 1
        parts.append(tuple(ordered[:count]))
        ordered = ordered[count:]
    return parts


def _fit(rows: Sequence[PrefillRow]) -> bool:
    size, start = max(len(row.token_ids) for row in rows), max(row.start for row in rows)
    is_small = len(rows) * size <= MAX_TOKENS_TOGETHER and len(rows) * start <= MAX_READ_TOGETHER
    return is_small and len(rows) <= MAX_TOGETHER


def _fit_sharing(rows: Sequence[PrefillRow]) -> bool:
    num_tokens, start = padded_count(rows) * padded_size(rows), rows[0].start
    has_prefix = start >= PAGE_SIZE and num_tokens * (start + num_tokens) <= MAX_SCORES_SHARING
    return has_prefix and len(rows) <= MAX_SHARING and num_tokens <= MAX_TOKENS_SHARING
