"""Pages: one pool of keys and one of values per layer, and the views through which the models use them.

A pool is [heads, pages, PAGE_SIZE, dim]. Heads come first so that neighbouring pages of a head lie side by side: a
sequence whose pages follow each other is read in place, as a slice; any other is gathered with a single copy.
Writes go into the pool in place: MLX donates the buffer, because nobody else holds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from vllm_mlx.runner.geometry import BatchPlace, Rectangle, SinglePlace, Span
from vllm_mlx.runner.layers import PAGE_SIZE, LayerShape


class Pool:
    """Keys and values of one layer."""

    def __init__(self, shape: LayerShape, num_pages: int) -> None:
        assert shape.dtype is not None
        self.window = shape.spec.window
        self.keys = mx.zeros((shape.heads, num_pages, PAGE_SIZE, shape.key_dim), shape.dtype)
        self.values = mx.zeros((shape.heads, num_pages, PAGE_SIZE, shape.value_dim), shape.dtype)

    def grow(self, num_pages: int) -> None:
        """Make room for pages up to `num_pages`; their contents move along."""
        self.keys, self.values = (_grown(pool, num_pages) for pool in (self.keys, self.values))

    def copy_pages(self, sources: mx.array, targets: mx.array) -> None:
        """Copy whole pages inside the pool."""
        self.keys[:, targets] = self.keys[:, sources]
        self.values[:, targets] = self.values[:, sources]

    def write(self, pages: mx.array, slots: mx.array, keys: mx.array, values: mx.array) -> None:
        """Store keys and values [heads, tokens, dim] of tokens at (page, slot in page)."""
        self.keys[:, pages, slots] = keys
        self.values[:, pages, slots] = values

    def read_span(self, span: Span) -> tuple[mx.array, mx.array]:
        """Keys and values [1, heads, tokens, dim] of a span."""
        return _read_span(self.keys, span), _read_span(self.values, span)

    def read_rectangle(self, rectangle: Rectangle) -> tuple[mx.array, mx.array]:
        """Keys and values [rows, heads, tokens, dim] of a rectangle."""
        return _read_rectangle(self.keys, rectangle), _read_rectangle(self.values, rectangle)


class PageStore:
    """The pools of all paged layers; they grow together, up to `max_pages`."""

    def __init__(self, shapes: Iterable[LayerShape], *, num_pages: int, max_pages: int) -> None:
        self.num_pages = min(num_pages, max_pages)
        self.max_pages = max_pages
        self.pools = [Pool(shape, self.num_pages) for shape in shapes]
        mx.eval(self.arrays())

    def ensure(self, page_id: int) -> None:
        """Grow until `page_id` exists. Doubles, so that the cost per page stays constant."""
        if page_id < self.num_pages or not self.pools:
            return
        self.num_pages = min(self.max_pages, max(page_id + 1, 2 * self.num_pages))
        for pool in self.pools:
            pool.grow(self.num_pages)
            mx.eval(pool.keys, pool.values)  # layer by layer: one layer's copy is all the extra memory

    def copy(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Carry out a step's page copies."""
        if not copies:
            return
        sources, targets = (mx.array([pair[side] for pair in copies]) for side in (0, 1))
        for pool in self.pools:
            pool.copy_pages(sources, targets)

    def arrays(self) -> list[mx.array]:
        """Everything a step writes; evaluated with it."""
        return [array for pool in self.pools for array in (pool.keys, pool.values)]

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(array.nbytes for array in self.arrays())


class SinglePageView:
    """A paged layer's cache, as the models know it, while one sequence's chunk is computed."""

    def __init__(self, pool: Pool, place: SinglePlace) -> None:
        self._pool = pool
        self._place = place
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [1, heads, tokens, dim] and return all that the chunk may look at."""
        place = self._place
        assert place.write_pages is not None
        self._pool.write(place.write_pages, place.write_slots, keys[0], values[0])
        if place.start == 0:
            return keys, values
        return self._pool.read_span(place.span(self._pool.window))

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of mlx-lm's caches: None, 'causal' or a boolean [tokens, keys]."""
        own = self._pool.window
        window = min((w for w in (own, window_size) if w is not None), default=None)
        return self._place.mask(window, begin=self._place.begin(own), as_array=return_array)


class BatchPageView:
    """A paged layer's cache while a batch is decoded. Attention reads the pages itself (`attend`)."""

    def __init__(self, pool: Pool, place: BatchPlace) -> None:
        self._pool = pool
        self._place = place
        self._fetched: tuple[mx.array, mx.array] | None = None
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, 1, dim]. What is returned only marks the layer: `attend` does the reading."""
        place = self._place
        self._pool.write(place.write_pages, place.write_slots, _by_head(keys), _by_head(values))
        self._fetched = keys, values
        return self._fetched

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        """None where the layer's own window says it all, else a boolean [rows, 1, 1, keys from position 0]."""
        if not return_array and window_size in (None, self._pool.window):
            return None
        return self._place.mask(window_size if window_size is not None else self._pool.window)

    def owns(self, keys: Any, values: Any) -> bool:
        """Whether `keys` and `values` are what `update_and_fetch` returned."""
        return self._fetched is not None and keys is self._fetched[0] and values is self._fetched[1]

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attention [rows, heads, 1, dim] over each row's own tokens."""
        place, window = self._place, self._pool.window
        if mask is not None and mask is not place.mask(window):
            keys, values = self._pool.read_rectangle(place.whole())
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        rectangles = place.rectangles(window)
        outputs = []
        for rectangle in rectangles:
            some = queries if len(rectangles) == 1 else queries[rectangle.index]
            keys, values = self._pool.read_rectangle(rectangle)
            outputs.append(
                mx.fast.scaled_dot_product_attention(some, keys, values, scale=scale, mask=rectangle.mask, sinks=sinks)
            )
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)[place.original_order(window)]


def _by_head(rows: mx.array) -> mx.array:
    """[rows, heads, 1, dim] as [heads, rows, dim]."""
    return rows[:, :, 0].swapaxes(0, 1)


def _grown(pool: mx.array, num_pages: int) -> mx.array:
    heads, old, page_size, dim = pool.shape
    return mx.concatenate([pool, mx.zeros((heads, num_pages - old, page_size, dim), pool.dtype)], axis=1)


def _read_span(pool: mx.array, span: Span) -> mx.array:
    heads, _, _, dim = pool.shape
    pages = (
        pool[:, span.page_ids[0] : span.page_ids[-1] + 1] if span.table is None else mx.take(pool, span.table, axis=1)
    )
    tokens = pages.reshape(heads, -1, dim)
    return tokens[None, :, span.skip : span.skip + span.length]


def _read_rectangle(pool: mx.array, rectangle: Rectangle) -> mx.array:
    heads, _, _, dim = pool.shape
    if rectangle.span is not None:
        return _read_span(pool, rectangle.span)
    rows = rectangle.table.shape[0]
    pages = mx.take(pool, rectangle.table, axis=1)  # [heads, rows, pages, PAGE_SIZE, dim]
    return pages.swapaxes(0, 1).reshape(rows, heads, -1, dim)[:, :, : rectangle.length]
