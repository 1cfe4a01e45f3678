"""Pages on a GPU: pools that only our kernels touch, and the view through which the models decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from vllm_mlx.core.step import DecodeRow
from vllm_mlx.runner.codec import PagePart, join_pages
from vllm_mlx.runner.decode_inputs import DecodeInputs, DecodePlace
from vllm_mlx.runner.geometry import BatchPlace, PoolIndex, SinglePlace, Span
from vllm_mlx.runner.kernels.check import Check, check_decode, pool_format
from vllm_mlx.runner.kernels.decode import PagedAttention
from vllm_mlx.runner.kernels.heads import HeadsKernel, HeadsVariant, PlainHeads, check_heads
from vllm_mlx.runner.kernels.paging import PageKernels
from vllm_mlx.runner.kernels.pools import PoolFormat, empty_pools
from vllm_mlx.runner.kernels.variant import DecodeVariant
from vllm_mlx.runner.layers import PAGE_SIZE, Fetching, LayerShape, narrower, paged_groups
from vllm_mlx.runner.pages import SinglePageView, write_split_pages
from vllm_mlx.runner.staging import Send


class Kernels:
    """The kernels of this process, built once per kind."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._pages: dict[PoolFormat, PageKernels] = {}
        self._decode: dict[DecodeVariant, PagedAttention] = {}
        self._heads: dict[HeadsVariant, HeadsKernel] = {}

    @property
    def waits_for_memory(self) -> bool:
        """Whether the host waits for the device when it makes an array, see `staging`."""
        return self._backend == "cuda"

    @property
    def plans_attention(self) -> bool:
        """Whether the library's attention plans each new shape, which takes longer than a short chunk (cuDNN)."""
        return self._backend == "cuda"

    def check(self, variant: DecodeVariant) -> Check:
        """Compile and try the kernels of a variant."""
        return check_decode(variant, self._backend)

    def pages(self, pools: PoolFormat) -> PageKernels:
        """Access to pools of this format."""
        if pools not in self._pages:
            self._pages[pools] = PageKernels(pools, self._backend)
        return self._pages[pools]

    def check_heads(
        self, variant: HeadsVariant, *, rates: mx.array, norms: tuple[mx.array, ...], plain: PlainHeads
    ) -> Check:
        """Compile and try the kernel that makes queries, keys and values of a product."""
        return check_heads(variant, self._backend, rates=rates, norms=norms, plain=plain)

    def heads(self, variant: HeadsVariant) -> HeadsKernel:
        """That kernel."""
        if variant not in self._heads:
            self._heads[variant] = HeadsKernel(variant, self._backend)
        return self._heads[variant]

    def decode(self, variant: DecodeVariant) -> PagedAttention:
        """Attention of this variant."""
        if variant not in self._decode:
            self._decode[variant] = PagedAttention(variant, self._backend)
        return self._decode[variant]


class WriteOrder:
    """The token of the last write into any pool: whoever takes it as an input comes after that write."""

    def __init__(self) -> None:
        self.token = mx.zeros((1,), mx.int32)

    @contextmanager
    def starting_at(self, token: mx.array) -> Iterator[None]:
        """For the time that a function of arrays is traced: writes come after `token`, an argument of it."""
        before, self.token = self.token, token
        try:
            yield
        finally:
            self.token = before


class KernelPool:
    """Keys and values of one layer, flat [heads x pages x PAGE_SIZE, dim], changed in place by kernels only.

    Quantised pools have words in place of elements, and `scales` besides, [heads x pages, ...]. A layer of another
    `group` may share the memory of one that is like it: it is `beside` that.

    Raises:
        ValueError: no kernel has this shape.
    """

    def __init__(
        self,
        shape: LayerShape,
        num_pages: int,
        *,
        kernels: Kernels,
        order: WriteOrder,
        group: int = 0,
        beside: KernelPool | None = None,
    ) -> None:
        variant = decode_variant(shape)
        assert shape.dtype is not None
        self.group = group
        self.window = shape.spec.window
        self.order = order
        self.dtype = shape.dtype
        self.scale = variant.scale
        self.attention = kernels.decode(variant)
        pools = pool_format(variant)
        self._access = kernels.pages(pools)
        self._raw = [(kernels.pages(raw), raw.page_size) for raw in pools.raw]
        self._heads, self._num_pages = shape.heads, num_pages
        if beside is None:
            (self.keys, self.values), self.scales = empty_pools(pools, num_pages)
        else:
            self.keys, self.values, self.scales = beside.keys, beside.values, beside.scales

    @property
    def arrays(self) -> list[mx.array]:
        """All that the pool is made of."""
        return [self.keys, self.values, *(self.scales or ())]

    @property
    def rounds(self) -> bool:
        """See LayerPool."""
        return self.scales is not None

    @property
    def _pairs(self) -> list[tuple[mx.array, mx.array]]:
        return [(self.keys, self.values), *([] if self.scales is None else [self.scales])]

    @property
    def page_parts(self) -> list[PagePart]:
        """See WholePages."""
        return [PagePart(self._heads, pool.size // self._heads // self._num_pages, pool.dtype) for pool in self.arrays]

    def read_pages(self, page_ids: mx.array) -> list[mx.array]:
        """Whole pages as they are stored: [heads, pages, elements] of each array."""
        after, shape = self.order.token, (self._heads, page_ids.size, -1)
        raw = zip(self._raw, self._pairs, strict=True)
        return [access.read(pool, page_ids[None], after=after).reshape(shape) for (access, _), p in raw for pool in p]

    def write_pages(self, page_ids: mx.array, parts: Sequence[mx.array]) -> None:
        """See WholePages."""
        for i, ((access, page_size), pools) in enumerate(zip(self._raw, self._pairs, strict=True)):
            slots = (page_ids[:, None] * page_size + mx.arange(page_size)[None]).reshape(-1).astype(mx.int32)
            rows = [
                part.reshape(1, self._heads, slots.size, pool.shape[1])
                for part, pool in zip(parts[2 * i : 2 * i + 2], pools, strict=True)
            ]
            self.order.token = access.write(*pools, *rows, slots=slots, after=self.order.token)

    def write(self, places: PoolIndex, keys: mx.array, values: mx.array) -> None:
        """Store keys and values [1, heads, tokens, dim] at `places`."""
        self._put(keys, values, places.within)

    def write_rows(self, place: DecodePlace, keys: mx.array, values: mx.array) -> None:
        """Store keys and values [rows, heads, 1, dim]."""
        self._put(keys, values, place.writes[self.group])

    def write_slots(self, slots: mx.array, keys: mx.array, values: mx.array) -> None:
        """Store keys and values [rows, heads, tokens, dim] at `slots` int32 [rows x tokens], counted within a head."""
        self._put(keys, values, slots)

    def read_span(self, span: Span) -> tuple[mx.array, mx.array]:
        """Keys and values [1, heads, tokens, dim] of a span."""
        keys, values = self.read_rows(span.pages.within[None])
        end = span.skip + span.length
        return keys[:, :, span.skip : end], values[:, :, span.skip : end]

    def read_rows(self, table: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values [rows, heads, pages x PAGE_SIZE, dim] of the pages `table` int32 [rows, pages]."""
        after, scales = self.order.token, self.scales or (None, None)
        keys, values = (
            self._access.read(pool, table, after=after, scales=scale)
            for pool, scale in zip((self.keys, self.values), scales, strict=True)
        )
        return keys, values

    def _put(self, keys: mx.array, values: mx.array, slots: mx.array) -> None:
        keys, values = keys.astype(self.dtype), values.astype(self.dtype)
        self.order.token = self._access.write(
            self.keys, self.values, keys, values, slots=slots, after=self.order.token, scales=self.scales
        )


class KernelBatchView(Fetching):
    """A paged layer's cache while a batch is decoded on a GPU."""

    def __init__(self, pool: KernelPool, place: DecodePlace) -> None:
        self._pool = pool
        self._place = place
        self._is_written = False
        self.offset = place.offset

    def enter(self, kernel: Callable[..., tuple[mx.array, mx.array]]) -> mx.array:
        """Have a `HeadsKernel`, given its product, write keys and values; returns what it makes of the queries."""
        pool, place = self._pool, self._place
        queries, pool.order.token = kernel(
            pool.keys,
            pool.values,
            positions=place.offset,
            slots=place.writes[pool.group],
            after=pool.order.token,
        )
        self._is_written = True
        return queries

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, 1, dim], unless a kernel has. What is returned only marks the layer: `attend` does the
        reading.
        """
        if not self._is_written:
            self._pool.write_rows(self._place, keys, values)
        self.fetched = keys, values
        return self.fetched

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> None:
        """None: the kernel hides what the layer's window hides, and models that want more are not served this way."""
        assert not return_array
        assert narrower(self._pool.window, window_size) == self._pool.window

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attention [rows, heads, 1, dim] over each row's own tokens, in the type of `queries`."""
        pool, place = self._pool, self._place
        assert mask is None
        assert scale == pool.scale, "the kernel was built for another scale"
        out = pool.attention(
            queries.astype(pool.dtype),
            pool.keys,
            pool.values,
            table=place.tables[pool.group],
            slots=place.slots,
            items=place.items[pool.window],
            starts=place.starts[pool.window],
            after=pool.order.token,
            sinks=sinks,
            scales=pool.scales,
        )
        return out.astype(queries.dtype)


class KernelPages:
    """Pages on a GPU, allocated whole. See PageStore."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        kernels: Kernels,
        num_pages: int,
        num_slots: int,
        max_pages: int,
        send: Send = mx.array,
    ) -> None:
        self._num_pages = num_pages
        self.send = send
        """How a step's numbers go to the device."""
        self.order = WriteOrder()
        grouping = paged_groups(shapes)
        self._stores: dict[int, KernelPool] = {}
        self.pools: list[KernelPool] = []
        """Of all layers, in order; those that share memory come once each."""
        for shape, (group, number) in zip(shapes, grouping.places, strict=True):
            beside = self._stores.get(number)
            pool = KernelPool(shape, num_pages, kernels=kernels, order=self.order, group=group, beside=beside)
            self._stores.setdefault(number, pool)
            self.pools.append(pool)
        self.inputs = DecodeInputs(
            windows=tuple(dict.fromkeys(shape.spec.window for shape in shapes)),
            group_windows=grouping.windows,
            kv_heads=min((shape.heads for shape in shapes), default=1),
            num_slots=num_slots,
            max_pages=max_pages,
            send=send,
        )
        mx.eval([pool.arrays for pool in self.stores])

    @property
    def num_groups(self) -> int:
        """Groups of layers, each with page tables of its own."""
        return self.inputs.num_groups

    @property
    def stores(self) -> list[KernelPool]:
        """A layer for each piece of memory, in order: together they are what a page is made of."""
        return [self._stores[number] for number in sorted(self._stores)]

    @property
    def nbytes(self) -> int:
        """See PageStore."""
        return sum(array.nbytes for pool in self.stores for array in pool.arrays)

    def ensure(self, page_id: int) -> None:
        """See PageStore."""
        assert page_id < max(1, self._num_pages), f"page {page_id} is out of range"

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """See PageStore."""
        if not copies:
            return
        sources, targets = (mx.array([pair[side] for pair in copies], dtype=mx.int32) for side in (0, 1))
        for pool in self.stores:
            pool.write_pages(targets, pool.read_pages(sources))

    def export_pages(self, page_ids: Sequence[int]) -> mx.array:
        """See PageStore."""
        ids = mx.array(list(page_ids), dtype=mx.int32)
        words = join_pages(part for pool in self.stores for part in pool.read_pages(ids))
        mx.async_eval(words)  # type: ignore[no-untyped-call]
        # The kernels that write come after the token only: with this they come after the read as well.
        self.order.token = self.order.token + words.reshape(-1)[:1].astype(mx.int32) * 0
        return words

    def import_pages(self, page_ids: Sequence[int], words: mx.array) -> None:
        """See PageStore."""
        self.ensure(max(page_ids))
        write_split_pages(self.stores, mx.array(list(page_ids), dtype=mx.int32), words)

    def written(self) -> list[mx.array]:
        """See PageStore."""
        # A step that samples nothing may need a table in its last layer only, which nobody waits for.
        return [*self.inputs.tables, self.order.token]

    def single_views(self, place: SinglePlace) -> list[Any]:
        """See PageStore."""
        return [SinglePageView(pool, place, group=pool.group, window=pool.window) for pool in self.pools]

    def batch_views(self, rows: Sequence[DecodeRow], place: BatchPlace) -> list[Any]:
        """See PageStore."""
        return self.views(self.inputs.place(rows))

    def views(self, place: DecodePlace) -> list[KernelBatchView]:
        """A cache per layer for rows that stand at `place`."""
        return [KernelBatchView(pool, place) for pool in self.pools]


def decode_variant(shape: LayerShape) -> DecodeVariant:
    """The kernel that a paged layer needs."""
    assert shape.attention is not None
    assert shape.dtype is not None
    return DecodeVariant(
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
        heads=shape.attention.heads,
        kv_heads=shape.heads,
        dtype=str(shape.dtype).removeprefix("mlx.core."),
        page_size=PAGE_SIZE,
        scale=shape.attention.scale,
        window=shape.spec.window,
        has_sinks=shape.attention.has_sinks,
        bits=shape.bits,
    )
