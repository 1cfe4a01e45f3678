"""Where the tokens of a step lie: positions, page tables and masks, computed once and shared by all layers.

Sliding windows look back `window` tokens, the current one included, as everywhere in mlx-lm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from vllm_mlx.core.step import DecodeRow, PrefillRow
from vllm_mlx.runner.kernels.plan import Integers
from vllm_mlx.runner.layers import PAGE_SIZE
from vllm_mlx.runner.staging import Send


class PoolIndex:
    """Where things stand in a flat pool, for all heads: `within` [..., n] counts inside the part of one head.

    `of(heads, size)` is [..., heads, n] for parts of `size` things; computed once, whatever the number of layers.
    """

    def __init__(self, within: Integers) -> None:
        self._within = within
        self._known: dict[tuple[int, int], mx.array] = {}

    @cached_property
    def within(self) -> mx.array:
        """The same for every head."""
        return mx.array(self._within)

    def of(self, heads: int, size: int) -> mx.array:
        """Indices for pools of `heads` parts of `size` things each."""
        if (heads, size) not in self._known:
            parts = np.arange(heads, dtype=np.int32)[:, None] * size
            self._known[heads, size] = mx.array(self._within[..., None, :] + parts)
        return self._known[heads, size]


Tables = Sequence[Sequence[int]]
"""The page tables of a sequence, one for each group of layers."""


class Span:
    """Positions begin .. end - 1 of one sequence and the pages that hold them."""

    def __init__(self, page_ids: Sequence[int], *, begin: int, end: int) -> None:
        first = begin // PAGE_SIZE
        self.page_ids = page_ids[first : -(-end // PAGE_SIZE)]
        self.skip = begin - first * PAGE_SIZE
        self.length = end - begin
        neighbours = zip(self.page_ids, self.page_ids[1:], strict=False)
        self.is_contiguous = all(after == before + 1 for before, after in neighbours)
        self.pages = PoolIndex(np.asarray(self.page_ids, dtype=np.int32))


class SinglePlace:
    """One sequence, one chunk: tokens at positions start .. end - 1. The offset is a plain integer.

    With `adds_masks`, attention is better off with what is added to the scores than with booleans.
    """

    def __init__(self, start: int, num_tokens: int, tables: Tables, *, adds_masks: bool = False) -> None:
        self.start = self.offset = start
        self.num_tokens = num_tokens
        self.end = start + num_tokens
        self.adds_masks = adds_masks
        self._tables = tables
        self._writes: dict[int, PoolIndex] = {}
        self._spans: dict[tuple[int, int | None], Span] = {}
        self._masks: dict[tuple[int | None, int], mx.array] = {}
        self._added: dict[tuple[int | None, int, mx.Dtype], mx.array] = {}

    def begin(self, window: int | None) -> int:
        """First position that any token of the chunk looks at."""
        return 0 if window is None else max(0, self.start - window + 1)

    def writes(self, group: int) -> PoolIndex:
        """Where the chunk goes."""
        if group not in self._writes:
            positions = np.arange(self.start, self.end, dtype=np.int32)
            self._writes[group] = PoolIndex(_slots_in(self._tables[group], positions))
        return self._writes[group]

    def span(self, group: int, window: int | None) -> Span:
        """What a layer of the group with this window reads, the chunk included."""
        if (group, window) not in self._spans:
            self._spans[group, window] = Span(self._tables[group], begin=self.begin(window), end=self.end)
        return self._spans[group, window]

    def mask(self, window: int | None, *, begin: int, as_array: bool) -> mx.array | str | None:
        """The chunk's mask over keys from position `begin`: None, 'causal', or a boolean [tokens, end - begin]."""
        window = self._narrowing(window, begin)
        if window is None and not as_array:
            return None if self.num_tokens == 1 else "causal"
        if (window, begin) not in self._masks:
            queries = mx.arange(self.start, self.end)[:, None]
            keys = mx.arange(begin, self.end)[None]
            mask = keys <= queries
            self._masks[window, begin] = mask if window is None else mask & (keys > queries - window)
        return self._masks[window, begin]

    def added_mask(self, window: int | None, *, begin: int, dtype: mx.Dtype) -> mx.array | str | None:
        """The same, with what is added to the scores in place of booleans."""
        mask, key = self.mask(window, begin=begin, as_array=False), (self._narrowing(window, begin), begin, dtype)
        if not isinstance(mask, mx.array):
            return mask
        if key not in self._added:
            self._added[key] = additive(mask, dtype)
        return self._added[key]

    def _narrowing(self, window: int | None, begin: int) -> int | None:
        """The window, if it hides anything of what is behind `begin`."""
        return None if window is not None and self.end - begin <= window else window


class PaddedChunks:
    """Chunks of several sequences side by side, padded to `num_rows` rows of `length` tokens.

    Padding is written to page 0, where nothing is kept.
    """

    def __init__(
        self, rows: Sequence[PrefillRow], *, num_rows: int, length: int, num_groups: int, send: Send = mx.array
    ) -> None:
        token_ids = np.zeros((num_rows, length), np.int32)
        starts, counts = np.zeros((2, num_rows, 1), np.int32)
        for i, row in enumerate(rows):
            token_ids[i, : len(row.token_ids)] = row.token_ids
            starts[i], counts[i] = row.start, len(row.token_ids)
        first, within = starts // PAGE_SIZE, np.arange(length, dtype=np.int32)
        positions = starts + within
        num_pages = 1 + (length + PAGE_SIZE - 2) // PAGE_SIZE  # a chunk that begins at the end of a page needs most
        slots = []
        for group in range(num_groups):
            pages = np.zeros((num_rows, num_pages), np.int32)
            for i, row in enumerate(rows):
                own = row.tables[group][first[i, 0] : first[i, 0] + num_pages]
                pages[i, : len(own)] = own
            places = _slots(np.take_along_axis(pages, positions // PAGE_SIZE - first, axis=1), positions)
            slots.append(np.where(within < counts, places, 0))
        self.token_ids = send(token_ids)
        self.slots = tuple(send(places.reshape(-1)) for places in slots)
        """Where the tokens go in each group of layers, counted over all pages."""
        self.lasts = send(np.maximum(0, counts[:, 0] - 1))
        """Index of each row's last token."""


class Rectangle:
    """Rows of a decode that are read together, padded to the longest of them."""

    def __init__(
        self,
        rows: Integers,
        table: Integers,
        *,
        begins: Integers,
        positions: Integers,
        window: int | None,
        span: Span | None,
        like: Rectangle | None,
    ) -> None:
        self.rows = rows
        """Where the rows stand in the batch."""
        self.index: mx.array = mx.array(rows) if like is None else like.index
        """The same, on the device."""
        self.num_slots = table.shape[1] * PAGE_SIZE
        """Tokens that the pages of a row have room for."""
        self.length = int((positions - begins).max()) + 1
        self.pages = PoolIndex(table)
        self.span = span
        """Of a lone row: its exact span, read without padding or mask."""
        self.mask: mx.array | None = None if like is None else like.mask
        """Boolean [rows, 1, 1, length], or None where nothing is hidden; that of `like`, which has the same rows."""
        if span is None and like is None:
            seen = _seen(begins[:, None] + np.arange(self.length, dtype=np.int32)[None], positions, window)
            self.mask = None if seen.all() else mx.array(seen)[:, None, None]


class BatchPlace:
    """One token of each of several sequences. The offset is an array [rows]."""

    def __init__(self, rows: Sequence[DecodeRow]) -> None:
        self._rows = rows
        self.positions = np.asarray([row.position for row in rows], dtype=np.int32)
        self.offset = mx.array(self.positions)
        self._writes: dict[int, PoolIndex] = {}
        self._tables: dict[int, Integers] = {}
        self._whole: dict[int, Rectangle] = {}
        self._plans: dict[int | None, dict[int, list[Rectangle]]] = {}
        self._orders: dict[int | None, mx.array] = {}
        self._masks: dict[int | None, mx.array] = {}

    def writes(self, group: int) -> PoolIndex:
        """Where the rows' new tokens go."""
        if group not in self._writes:
            pages = [row.tables[group][row.position // PAGE_SIZE] for row in self._rows]
            self._writes[group] = PoolIndex(_slots(np.asarray(pages, dtype=np.int32), self.positions))
        return self._writes[group]

    def _table(self, group: int) -> Integers:
        if group not in self._tables:
            tables = [row.tables[group] for row in self._rows]
            table = self._tables[group] = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
            for i, page_ids in enumerate(tables):
                table[i, : len(page_ids)] = page_ids
        return self._tables[group]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, this step's included."""
        return int(self.positions.max()) + 1

    def mask(self, window: int | None) -> mx.array:
        """Boolean [rows, 1, 1, longest] over keys from position 0."""
        if window not in self._masks:
            seen = _seen(np.arange(self.longest, dtype=np.int32)[None], self.positions, window)
            self._masks[window] = mx.array(seen)[:, None, None]
        return self._masks[window]

    def whole(self, group: int) -> Rectangle:
        """All rows, all positions from 0, in one rectangle."""
        if group not in self._whole:
            rows = np.arange(len(self._rows), dtype=np.int32)
            self._whole[group] = self._rectangle(rows, group, None)
        return self._whole[group]

    def rectangles(self, group: int, window: int | None) -> list[Rectangle]:
        """What a layer with this window reads, in rectangles that pad no row to more than twice its pages."""
        plans = self._plans.setdefault(window, {})
        if group not in plans:
            like = next(iter(plans.values()), None)
            if like is None:
                _, num_pages = self._page_range(window)
                classes = np.ceil(np.log2(num_pages)).astype(np.int32)
                members = [np.flatnonzero(classes == size).astype(np.int32) for size in np.unique(classes)]
                plans[group] = [self._rectangle(rows, group, window) for rows in members]
                self._orders[window] = mx.array(np.argsort(np.concatenate(members)).astype(np.int32))
            else:
                plans[group] = [self._rectangle(each.rows, group, window, like=each) for each in like]
        return plans[group]

    def original_order(self, window: int | None) -> mx.array:
        """Index that puts the rows of the rectangles of a window, one after the other, back into batch order."""
        return self._orders[window]

    def _page_range(self, window: int | None) -> tuple[Integers, Integers]:
        """First page and number of pages that each row reads."""
        begins = np.zeros_like(self.positions) if window is None else np.maximum(0, self.positions - window + 1)
        first = begins // PAGE_SIZE
        return first, self.positions // PAGE_SIZE - first + 1

    def _rectangle(self, rows: Integers, group: int, window: int | None, *, like: Rectangle | None = None) -> Rectangle:
        first, num_pages = self._page_range(window)
        all_pages = self._table(group)
        width = int(num_pages[rows].max())
        column = np.arange(width, dtype=np.int32)[None]
        # Columns past a row's own pages read page 0, which the mask hides.
        pages = all_pages[rows[:, None], np.minimum(first[rows][:, None] + column, all_pages.shape[1] - 1)]
        table = np.where(column < num_pages[rows][:, None], pages, 0).astype(np.int32)
        positions, span = self.positions[rows], None
        if len(rows) == 1:
            end = int(positions[0]) + 1
            begin = 0 if window is None else max(0, end - window)
            span = Span(self._rows[int(rows[0])].tables[group], begin=begin, end=end)
        begins = first[rows] * PAGE_SIZE
        return Rectangle(rows, table, begins=begins, positions=positions, window=window, span=span, like=like)


def _seen(keys: Integers, positions: Integers, window: int | None) -> NDArray[np.bool_]:
    """Which of `keys` (positions, [rows or 1, n]) the tokens at `positions` [rows] look at."""
    seen: NDArray[np.bool_] = keys <= positions[:, None]
    return seen if window is None else seen & (keys > (positions - window)[:, None])


def _slots_in(page_ids: Sequence[int], positions: Integers) -> Integers:
    """Token slots of positions, in order, of the sequence that has these pages."""
    places = positions // PAGE_SIZE
    first = int(places[0])
    own = np.asarray(page_ids[first : int(places[-1]) + 1], dtype=np.int32)  # converting all of a long table takes long
    return _slots(own[places - first], positions)


def _slots(pages: Integers, positions: Integers) -> Integers:
    """Token slots, counted over all pages, of positions that lie in `pages`."""
    return pages * PAGE_SIZE + positions % PAGE_SIZE


def additive(seen: mx.array, dtype: mx.Dtype) -> mx.array:
    """A boolean mask as what is added to the scores. MLX would make this of it in every layer, for every head."""
    return mx.where(seen, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))
