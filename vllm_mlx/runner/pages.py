"""Pages: pools of keys and values, and the views through which the models use them.

A pool is [heads, pages, PAGE_SIZE, dim], kept flat as [heads x pages x PAGE_SIZE, dim]: one index per token makes
the cheapest scatter. Heads come first so that neighbouring pages of a head lie side by side: a sequence whose pages
follow each other is read in place, as a slice; any other is gathered with a single copy. Writes go into the pool in
place: MLX donates the buffer, because nobody else holds it. Quantised pools have words in place of elements, and two
arrays more for the scales; what is read is computed back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx

from vllm_mlx.core.step import DecodeRow
from vllm_mlx.runner.codec import PagePart, join_pages, split_pages
from vllm_mlx.runner.geometry import BatchPlace, PoolIndex, Rectangle, SinglePlace, Span
from vllm_mlx.runner.layers import PAGE_SIZE, Fetching, LayerShape, narrower, paged_groups, pool_shapes


class Pool:
    """Keys and values of one layer of every group."""

    def __init__(self, shape: LayerShape, num_pages: int) -> None:
        assert shape.dtype is not None
        self.heads = shape.heads
        self.num_pages = num_pages
        self.dtype = shape.dtype
        self._packing = shape.packing
        self.arrays = _empty(shape, shape.heads * num_pages * PAGE_SIZE)
        """Keys and values, then their scales if they are quantised: [heads x pages x PAGE_SIZE, ...]."""

    @property
    def rounds(self) -> bool:
        """See LayerPool."""
        return self._packing is not None

    def grow(self, num_pages: int) -> None:
        """Make room for pages up to `num_pages`; their contents move along."""
        self.arrays = [self._grown(pool, num_pages) for pool in self.arrays]
        self.num_pages = num_pages

    @property
    def page_parts(self) -> list[PagePart]:
        """What a page is made of, an array each."""
        return [PagePart(self.heads, pool.size // self.heads // self.num_pages, pool.dtype) for pool in self.arrays]

    def read_pages(self, page_ids: mx.array) -> list[mx.array]:
        """Whole pages as they are stored: [heads, pages, elements] of each array."""
        return [pool.reshape(self.heads, self.num_pages, -1)[:, page_ids] for pool in self.arrays]

    def write_pages(self, page_ids: mx.array, parts: Sequence[mx.array]) -> None:
        """Put whole pages where others were; `parts` as `read_pages` gives them."""
        index = mx.arange(self.heads)[:, None] * self.num_pages + page_ids
        for i, part in enumerate(parts):
            pages = self._whole_pages(self.arrays[i])
            pages[index] = part
            self.arrays[i] = pages.reshape(self.heads * self.num_pages * PAGE_SIZE, -1)

    def write(self, places: PoolIndex, keys: mx.array, values: mx.array) -> None:
        """Store keys and values [rows, heads, tokens, dim] at `places`; rows or tokens are 1."""
        index = places.of(self.heads, self.num_pages * PAGE_SIZE)
        for pool, rows in zip(self.arrays, self._stored(_by_head(keys), _by_head(values)), strict=True):
            pool[index] = rows

    def read_span(self, span: Span) -> tuple[mx.array, mx.array]:
        """Keys and values [1, heads, tokens, dim] of a span."""
        return self._loaded([self._read_span(pool, span) for pool in self.arrays])

    def read_rectangle(self, rectangle: Rectangle) -> tuple[mx.array, mx.array]:
        """Keys and values [rows, heads, tokens, dim] of a rectangle."""
        if rectangle.span is not None:
            return self.read_span(rectangle.span)
        return self._loaded([self._read_rectangle(pool, rectangle) for pool in self.arrays])

    def _stored(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """What goes into the arrays."""
        if self._packing is None:
            return [keys, values]
        (key_words, key_scales), (value_words, value_scales) = self._packing.pack(keys), self._packing.pack(values)
        return [key_words, value_words, key_scales, value_scales]

    def _loaded(self, parts: list[mx.array]) -> tuple[mx.array, mx.array]:
        """Keys and values of what was read from the arrays."""
        if self._packing is None:
            return parts[0], parts[1]
        keys, values = (self._packing.unpack(parts[i], parts[i + 2], self.dtype) for i in (0, 1))
        return keys, values

    def _grown(self, pool: mx.array, num_pages: int) -> mx.array:
        more = mx.zeros((self.heads, (num_pages - self.num_pages) * PAGE_SIZE, pool.shape[-1]), pool.dtype)
        by_head = pool.reshape(self.heads, self.num_pages * PAGE_SIZE, -1)
        return mx.concatenate([by_head, more], axis=1).reshape(self.heads * num_pages * PAGE_SIZE, -1)

    def _read_span(self, pool: mx.array, span: Span) -> mx.array:
        if span.is_contiguous:
            begin = span.page_ids[0] * PAGE_SIZE + span.skip
            tokens = pool.reshape(self.heads, self.num_pages * PAGE_SIZE, -1)
            return tokens[None, :, begin : begin + span.length]
        pages = self._whole_pages(pool)[span.pages.of(self.heads, self.num_pages)]
        tokens = pages.reshape(self.heads, -1, pool.shape[-1])
        return tokens[None, :, span.skip : span.skip + span.length]

    def _read_rectangle(self, pool: mx.array, rectangle: Rectangle) -> mx.array:
        pages = self._whole_pages(pool)[rectangle.pages.of(self.heads, self.num_pages)]
        return pages.reshape(-1, self.heads, rectangle.num_slots, pool.shape[-1])[:, :, : rectangle.length]

    def _whole_pages(self, pool: mx.array) -> mx.array:
        """[heads x pages, ...]: indexed by page, each is copied at once."""
        return pool.reshape(self.heads * self.num_pages, -1)


class LayerPool(Protocol):
    """What a single sequence needs of a pool: `Pool` has it, and on a GPU `KernelPool`."""

    dtype: mx.Dtype
    """Of keys and values as they are given and read."""

    @property
    def rounds(self) -> bool:
        """Whether what is read is only near what was written: the pool is quantised."""
        ...

    def write(self, places: PoolIndex, keys: mx.array, values: mx.array) -> None:
        """Store keys and values [1, heads, tokens, dim] at `places`."""
        ...

    def read_span(self, span: Span) -> tuple[mx.array, mx.array]:
        """Keys and values [1, heads, tokens, dim] of a span."""
        ...


class PageStore(Protocol):
    """The pools of all paged layers, and the views of them that the model gets as caches, in order.

    Layers of different groups share a pool: their pages are not the same.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        ...

    def ensure(self, page_id: int) -> None:
        """Have memory for pages up to `page_id`."""
        ...

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Carry out a step's page copies; all sources are read before any target is written."""
        ...

    def export_pages(self, page_ids: Sequence[int]) -> mx.array:
        """The pages as they are now, words uint32 [pages, words] (`codec.join_pages`)."""
        ...

    def import_pages(self, page_ids: Sequence[int], words: mx.array) -> None:
        """Write pages that were exported from pages of the same model."""
        ...

    def written(self) -> list[mx.array]:
        """Arrays that a step changes: evaluating them carries its writes out."""
        ...

    def single_views(self, place: SinglePlace) -> list[Any]:
        """A cache per layer for a chunk of one sequence."""
        ...

    def batch_views(self, rows: Sequence[DecodeRow], place: BatchPlace) -> list[Any]:
        """A cache per layer for one token of each of `rows`, which stand at `place`."""
        ...


class GrowingPages:
    """Pages that grow together as they are used, up to `max_pages`."""

    def __init__(self, shapes: Sequence[LayerShape], *, num_pages: int, max_pages: int) -> None:
        self._num_pages = min(num_pages, max_pages)
        self._max_pages = max_pages
        self._pools = [Pool(shape, self._num_pages) for shape in pool_shapes(shapes)]
        places = zip(shapes, paged_groups(shapes).places, strict=True)
        self._layers = [(self._pools[pool], group, shape.spec.window) for shape, (group, pool) in places]
        mx.eval(self.written())

    @property
    def nbytes(self) -> int:
        """See PageStore."""
        return sum(array.nbytes for array in self.written())

    def ensure(self, page_id: int) -> None:
        """See PageStore. Doubles, so that the cost per page stays constant."""
        if page_id < self._num_pages or not self._pools:
            return
        self._num_pages = min(self._max_pages, max(page_id + 1, 2 * self._num_pages))
        for pool in self._pools:
            pool.grow(self._num_pages)
            mx.eval(pool.arrays)  # layer by layer: one layer's copy is all the extra memory

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """See PageStore."""
        if not copies:
            return
        self.ensure(max(target for _, target in copies))
        sources, targets = (mx.array([pair[side] for pair in copies]) for side in (0, 1))
        parts = [pool.read_pages(sources) for pool in self._pools]
        mx.eval(parts)  # a write that finds the pool still to be read copies all of it
        for pool, read in zip(self._pools, parts, strict=True):
            pool.write_pages(targets, read)

    def export_pages(self, page_ids: Sequence[int]) -> mx.array:
        """See PageStore. Done at once, for the same reason as in `copy`."""
        words = join_pages(part for pool in self._pools for part in pool.read_pages(mx.array(list(page_ids))))
        mx.eval(words)
        return words

    def import_pages(self, page_ids: Sequence[int], words: mx.array) -> None:
        """See PageStore."""
        self.ensure(max(page_ids))
        write_split_pages(self._pools, mx.array(list(page_ids)), words)

    def written(self) -> list[mx.array]:
        """See PageStore."""
        return [array for pool in self._pools for array in pool.arrays]

    def single_views(self, place: SinglePlace) -> list[Any]:
        """See PageStore."""
        return [SinglePageView(pool, place, group=group, window=window) for pool, group, window in self._layers]

    def batch_views(self, rows: Sequence[DecodeRow], place: BatchPlace) -> list[Any]:
        """See PageStore."""
        return [BatchPageView(pool, place, group=group, window=window) for pool, group, window in self._layers]


class SinglePageView:
    """A paged layer's cache, as the models know it, while one sequence's chunk is computed."""

    def __init__(self, pool: LayerPool, place: SinglePlace, *, group: int, window: int | None) -> None:
        self._pool = pool
        self._place = place
        self._group = group
        self._window = window
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [1, heads, tokens, dim] and return all that the chunk may look at.

        Where pages are quantised, the chunk sees itself as others will see it, so that no result depends on where
        chunks end or on what was found cached.
        """
        self._pool.write(self._place.writes(self._group), keys, values)
        if self._place.start == 0 and not self._pool.rounds:
            return keys, values
        return self._pool.read_span(self._place.span(self._group, self._window))

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of mlx-lm's caches: None, 'causal' or a boolean [tokens, keys].

        In place of booleans, what is added to the scores, if the place says so and attention alone will see it.
        """
        begin, window = self._place.begin(self._window), narrower(self._window, window_size)
        if return_array or not self._place.adds_masks:
            return self._place.mask(window, begin=begin, as_array=return_array)
        return self._place.added_mask(window, begin=begin, dtype=self._pool.dtype)


class BatchPageView(Fetching):
    """A paged layer's cache while a batch is decoded. Attention reads the pages itself (`attend`)."""

    def __init__(self, pool: Pool, place: BatchPlace, *, group: int, window: int | None) -> None:
        self._pool = pool
        self._place = place
        self._group = group
        self._window = window
        self.offset = place.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, 1, dim]. What is returned only marks the layer: `attend` does the reading."""
        self._pool.write(self._place.writes(self._group), keys, values)
        self.fetched = keys, values
        return self.fetched

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        """None where the layer's own window says it all, else a boolean [rows, 1, 1, keys from position 0]."""
        window = narrower(self._window, window_size)
        return self._place.mask(window) if return_array or window != self._window else None

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attention [rows, heads, 1, dim] over each row's own tokens."""
        place, window = self._place, self._window
        if mask is not None and mask is not place.mask(window):
            keys, values = self._pool.read_rectangle(place.whole(self._group))
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        rectangles = place.rectangles(self._group, window)
        outputs = []
        for rectangle in rectangles:
            some = queries if len(rectangles) == 1 else queries[rectangle.index]
            keys, values = self._pool.read_rectangle(rectangle)
            outputs.append(
                mx.fast.scaled_dot_product_attention(some, keys, values, scale=scale, mask=rectangle.mask, sinks=sinks)
            )
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)[place.original_order(window)]


class WholePages(Protocol):
    """What whole pages need of a pool."""

    @property
    def page_parts(self) -> list[PagePart]:
        """What a page is made of, an array each."""
        ...

    def write_pages(self, page_ids: mx.array, parts: Sequence[mx.array]) -> None:
        """Put whole pages where others were, [heads, pages, elements] of each array."""
        ...


def write_split_pages(pools: Sequence[WholePages], page_ids: mx.array, words: mx.array) -> None:
    """Write pages over all layers, words [pages, words], each layer's part to its pool."""
    parts = iter(split_pages(words, [part for pool in pools for part in pool.page_parts]))
    for pool in pools:
        pool.write_pages(page_ids, [next(parts) for _ in pool.page_parts])


def _empty(shape: LayerShape, num_tokens: int) -> list[mx.array]:
    """The arrays of a layer's pool, all zero."""
    assert shape.dtype is not None
    packing, dims = shape.packing, (shape.key_dim, shape.value_dim)
    if packing is None:
        return [mx.zeros((num_tokens, dim), shape.dtype) for dim in dims]
    words = [mx.zeros((num_tokens, packing.words(dim)), mx.uint32) for dim in dims]
    return words + [mx.zeros((num_tokens, packing.scales(dim)), mx.float16) for dim in dims]


def _by_head(rows: mx.array) -> mx.array:
    """[rows, heads, 1, dim] as [heads, rows, dim], or [1, heads, tokens, dim] as [heads, tokens, dim]."""
    return rows[0] if rows.shape[0] == 1 else rows[:, :, 0].swapaxes(0, 1)
