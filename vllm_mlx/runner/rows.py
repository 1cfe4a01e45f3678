"""Rows and recurrent states: what cannot live in pages, one contiguous piece per sequence.

A sequence is alone while its prompt is computed (`RowCache`, or the library's own `ArraysCache` for a recurrent
state) and joins the batch at its first decode. Joining appends a row, leaving moves the last row into the gap: a batch
whose members stay the same is never copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache

from vllm_mlx.core.cachespec import Layout
from vllm_mlx.runner.geometry import BatchPlace, SinglePlace
from vllm_mlx.runner.layers import ModelLayers, flat_caches, narrower

CAPACITY_STEP = 256
"""Tokens by which a row's capacity is rounded up."""


class RowCache:
    """Keys and values of one layer, [rows, heads, capacity, dim]; row i holds `lengths[i]` tokens."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def reserve(self, num_rows: int, num_tokens: int, keys: mx.array, values: mx.array) -> None:
        """Have room for that many rows and tokens; shapes and types are those of `keys` and `values`."""
        self.keys = _reserved(self.keys, num_rows, num_tokens, keys)
        self.values = _reserved(self.values, num_rows, num_tokens, values)

    def arrays(self) -> list[mx.array]:
        """What a step writes."""
        return [array for array in (self.keys, self.values) if array is not None]


class SingleRowView:
    """A row layer's cache, as the models know it, while one sequence's chunk is computed."""

    def __init__(self, row: RowCache, place: SinglePlace, window: int | None) -> None:
        self._row = row
        self._place = place
        self._window = window
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [1, heads, tokens, dim] and return all tokens so far."""
        row, start, end = self._row, self._place.start, self._place.end
        row.reserve(1, end, keys, values)
        assert row.keys is not None
        assert row.values is not None
        row.keys[:1, :, start:end] = keys
        row.values[:1, :, start:end] = values
        return row.keys[:1, :, :end], row.values[:1, :, :end]

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of mlx-lm's caches: None, 'causal' or a boolean [tokens, keys]."""
        return self._place.mask(narrower(self._window, window_size), begin=0, as_array=return_array)


class BatchRowView:
    """A row layer's cache while a batch is decoded; rows are in the batch's order."""

    def __init__(self, rows: RowCache, place: BatchPlace, window: int | None, *, scores_rank: int) -> None:
        self._rows = rows
        self._place = place
        self._window = window
        self._scores_rank = scores_rank
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, 1, dim] at each row's end; returns [rows, heads, longest, dim]."""
        num_rows, rows, place = keys.shape[0], self._rows, self._place
        rows.reserve(num_rows, place.longest, keys, values)
        assert rows.keys is not None
        assert rows.values is not None
        index = mx.arange(num_rows)
        rows.keys[index, :, place.offset] = keys[:, :, 0]
        rows.values[index, :, place.offset] = values[:, :, 0]
        return rows.keys[:num_rows, :, : place.longest], rows.values[:num_rows, :, : place.longest]

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Boolean [rows, 1, 1, longest], with as many axes as the model's scores."""
        mask = self._place.mask(narrower(self._window, window_size))
        return mask.reshape(mask.shape[0], *[1] * (self._scores_rank - 2), mask.shape[-1])


class BatchLayer(Protocol):
    """One layer's rows of the running batch."""

    @property
    def cache(self) -> Any:
        """What holds them: a `RowCache` or the library's own cache."""
        ...

    def join(self, position: int, single: Any) -> None:
        """Put a sequence's own cache at `position`, the end of the batch."""
        ...

    def leave(self, position: int, last: int, *, keep: bool) -> Any:
        """Take a row out, moving row `last` into its place; returns the row as a sequence's own cache if `keep`."""
        ...

    def arrays(self) -> list[mx.array]:
        """What a step writes."""
        ...


class RowBatch(RowCache):
    """`RowCache` of the running batch."""

    @property
    def cache(self) -> RowCache:
        """See BatchLayer."""
        return self

    def join(self, position: int, single: RowCache) -> None:
        """See BatchLayer."""
        assert single.keys is not None
        assert single.values is not None
        length = single.keys.shape[2]
        self.reserve(position + 1, length, single.keys, single.values)
        assert self.keys is not None
        assert self.values is not None
        self.keys[position : position + 1, :, :length] = single.keys
        self.values[position : position + 1, :, :length] = single.values

    def leave(self, position: int, last: int, *, keep: bool) -> RowCache | None:
        """See BatchLayer."""
        assert self.keys is not None
        assert self.values is not None
        kept: RowCache | None = None
        if keep:
            kept = RowCache()
            kept.keys, kept.values = self.keys[mx.array([position])], self.values[mx.array([position])]
        if position != last:
            # A gather has a buffer of its own; a slice would share it and make the write below copy everything.
            source = mx.array([last])
            keys, values = self.keys[source], self.values[source]
            mx.eval(keys, values)
            self.keys[position : position + 1] = keys
            self.values[position : position + 1] = values
        return kept


class StateBatch:
    """Recurrent states of the running batch, in the library's own cache."""

    def __init__(self, prototype: ArraysCache) -> None:
        self.cache = type(prototype)(len(prototype.cache))

    def join(self, position: int, single: ArraysCache) -> None:
        """See BatchLayer."""
        for i, state in enumerate(single.cache):
            if state is not None:
                self.cache[i] = state if position == 0 else mx.concatenate([self.cache[i], state])

    def leave(self, position: int, last: int, *, keep: bool) -> ArraysCache | None:
        """See BatchLayer."""
        kept = self.cache.extract(position) if keep else None
        order = [last if i == position else i for i in range(last)]
        for i, state in enumerate(self.cache.cache):
            self.cache[i] = state[mx.array(order)] if order and state is not None else None
        return kept

    def arrays(self) -> list[mx.array]:
        """What a step writes."""
        return [state for state in self.cache.cache if state is not None]


class Residents:
    """Which slots are in the running batch, in which order, and the own caches of those that are not."""

    def __init__(self, layers: list[BatchLayer]) -> None:
        self.layers = layers
        self.order: list[int] = []
        self.singles: dict[int, list[Any]] = {}

    def add(self, slot: int, singles: list[Any]) -> None:
        """A sequence starts with empty caches of its own."""
        self.remove(slot)
        self.singles[slot] = singles

    def remove(self, slot: int) -> None:
        """Forget a sequence."""
        if slot in self.order:
            self._take_out(slot, keep=False)
        self.singles.pop(slot, None)

    def gather(self, slots: Sequence[int]) -> list[int]:
        """Make the batch hold exactly these slots; returns them in its order."""
        wanted = set(slots)
        for slot in [slot for slot in self.order if slot not in wanted]:
            self._take_out(slot, keep=True)
        present = set(self.order)
        for slot in (slot for slot in slots if slot not in present):
            for layer, single in zip(self.layers, self.singles.pop(slot), strict=True):
                layer.join(len(self.order), single)
            self.order.append(slot)
        return list(self.order)

    def arrays(self) -> list[mx.array]:
        """What a step writes in the batch."""
        return [array for layer in self.layers for array in layer.arrays()]

    def holders(self, slot: int) -> tuple[list[Any], int]:
        """The caches that hold a sequence, a layer each, and its row in them."""
        if slot in self.singles:
            return self.singles[slot], 0
        return [layer.cache for layer in self.layers], self.order.index(slot)

    def _take_out(self, slot: int, *, keep: bool) -> None:
        position, last = self.order.index(slot), len(self.order) - 1
        kept = [layer.leave(position, last, keep=keep) for layer in self.layers]
        self.order[position] = self.order[last]
        self.order.pop()
        if keep:
            self.singles[slot] = kept


def batch_layers(model: nn.Module, layers: ModelLayers) -> list[Any]:
    """What the running batch keeps per layer that is not paged."""
    built: list[Any] = []
    for cache, shape in zip(flat_caches(model), layers.shapes, strict=True):
        if shape.spec.layout is Layout.ROWS:
            built.append(RowBatch())
        elif shape.spec.layout is Layout.STATE:
            built.append(StateBatch(cache))
    return built


def fresh_singles(model: nn.Module, layers: ModelLayers) -> list[Any]:
    """Empty caches of one sequence, for the layers that are not paged."""
    layouts = [shape.spec.layout for shape in layers.shapes]
    if all(layout is Layout.PAGES for layout in layouts):
        return []
    flat = zip(flat_caches(model), layouts, strict=True)
    return [RowCache() if layout is Layout.ROWS else cache for cache, layout in flat if layout is not Layout.PAGES]


def arrays_of(caches: Iterable[Any]) -> list[mx.array]:
    """All arrays of caches, ours and the library's."""
    states = [cache.arrays() if isinstance(cache, RowCache) else cache.state for cache in caches]
    return [array for _, array in tree_flatten(states) if isinstance(array, mx.array)]


def _reserved(array: mx.array | None, num_rows: int, num_tokens: int, like: mx.array) -> mx.array:
    """`array` [rows, heads, capacity, dim], grown (and copied) if it has too few rows or tokens."""
    rows, tokens = (0, 0) if array is None else (array.shape[0], array.shape[2])
    if array is not None and num_rows <= rows and num_tokens <= tokens:
        return array
    new_rows = rows if num_rows <= rows else max(num_rows, 2 * rows)
    wanted = tokens if num_tokens <= tokens else max(num_tokens, tokens * 3 // 2)
    new_tokens = -(-wanted // CAPACITY_STEP) * CAPACITY_STEP
    grown = mx.zeros((new_rows, like.shape[1], new_tokens, like.shape[3]), like.dtype)
    if array is not None:
        grown[:rows, :, :tokens] = array
    return grown
