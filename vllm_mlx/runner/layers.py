"""Which layers a model has, how each must be kept, and how large a page is: found out by running one token.

mlx-lm's `make_prompt_cache` names the cache class of every layer; it does not say shapes, nor whether a layer's
attention goes through the entry point that we bind. A probe run with recording caches tells both. A second one tells
whether anything else reads the keys and values that a cache returns, such as later layers that share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from vllm_mlx.core.cachespec import CacheSpec, LayerSpec, Layout
from vllm_mlx.runner.kernels.packing import Packing, packing_of
from vllm_mlx.runner.page_groups import Grouping, group_layers

PAGE_SIZE = 32


class AttentionShape(msgspec.Struct, frozen=True):
    """What a layer's attention is called with while it decodes."""

    heads: int
    """Query heads."""
    scale: float
    has_sinks: bool
    has_mask: bool
    """The model wants a mask although the layer's own window says it all: no kernel knows what it hides."""


class LayerShape(msgspec.Struct, frozen=True):
    """One flattened layer: its spec and, where it holds keys and values, their heads, sizes and type."""

    spec: LayerSpec
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    dtype: mx.Dtype | None = None
    attention: AttentionShape | None = None
    """How the layer attends, if its attention goes through the bound entry point."""
    bits: int | None = None
    """Of a stored element where its pages are quantised: 8 or 4."""

    @property
    def packing(self) -> Packing | None:
        """How its pages are quantised, if they are."""
        return None if self.bits is None else packing_of(self.bits, key_dim=self.key_dim, value_dim=self.value_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in its pages."""
        packing, dims = self.packing, (self.key_dim, self.value_dim)
        if packing is not None:
            return self.heads * sum(packing.token_bytes(dim) for dim in dims)
        return 0 if self.dtype is None else self.heads * sum(dims) * self.dtype.size


class ModelLayers(msgspec.Struct, frozen=True):
    """The flattened layers and how to fold per-layer views back into what the model expects."""

    shapes: tuple[LayerShape, ...]
    groups: tuple[int, ...]
    """Per model layer: 0 for a single cache, else the number of parts of a composite one."""
    vocab_size: int
    """Width of the logits."""

    def fold(self, views: list[Any]) -> list[Any]:
        """Views of flattened layers, as the model's cache list."""
        folded: list[Any] = []
        at = 0
        for size in self.groups:
            if size:
                folded.append(CacheList(*views[at : at + size]))
                at += size
            else:
                folded.append(views[at])
                at += 1
        return folded

    @property
    def paged(self) -> tuple[LayerShape, ...]:
        """The layers in pages, in order."""
        return tuple(shape for shape in self.shapes if shape.spec.layout is Layout.PAGES)

    def out_of_pages(self) -> ModelLayers:
        """The same layers with rows in place of pages."""
        return msgspec.structs.replace(self, shapes=tuple(_out_of_pages(shape) for shape in self.shapes))

    def quantised(self, bits: int) -> ModelLayers:
        """The same layers with quantised pages, where their heads divide into groups."""
        return msgspec.structs.replace(self, shapes=tuple(_quantised(shape, bits) for shape in self.shapes))

    def cache_spec(self) -> CacheSpec:
        """What the engine needs to know."""
        grouping = paged_groups(self.paged)
        page_bytes = sum(shape.token_bytes for shape in pool_shapes(self.paged)) * PAGE_SIZE
        return CacheSpec(tuple(shape.spec for shape in self.shapes), PAGE_SIZE, page_bytes, grouping.windows)


def paged_groups(shapes: Sequence[LayerShape]) -> Grouping:
    """Which of the layers in pages share a table, and which the memory of a pool."""
    forms = {(shape.heads, shape.key_dim, shape.value_dim, str(shape.dtype), shape.bits) for shape in shapes}
    return group_layers([shape.spec.window for shape in shapes], are_alike=len(forms) == 1)


def pool_shapes(shapes: Sequence[LayerShape]) -> list[LayerShape]:
    """A layer for each pool, in the order of the pools."""
    found = {pool: shape for shape, (_, pool) in zip(shapes, paged_groups(shapes).places, strict=True)}
    return [found[pool] for pool in sorted(found)]


class Fetching:
    """A cache view that answers attention over the keys and values that it gave out last."""

    fetched: tuple[mx.array, mx.array] | None = None
    """What `update_and_fetch` returned."""

    def owns(self, keys: Any, values: Any) -> bool:
        """Whether `keys` and `values` are the very arrays that were given out."""
        return self.fetched is not None and keys is self.fetched[0] and values is self.fetched[1]


class RecordingCache(Fetching, KVCache):  # type: ignore[misc]
    """A single-sequence cache that notes how the bound entry point is called with the keys it returned, if it is."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.attention: AttentionShape | None = None
        self.was_asked_for_mask = False

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """None, as while decoding, where the layer's own window is all that is asked for."""
        is_own = narrower(self.window, window_size) == self.window
        if is_own and not return_array:
            return None
        self.was_asked_for_mask = True
        return mx.ones((num_tokens, self.offset + num_tokens), mx.bool_)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        found: tuple[mx.array, mx.array] = super().update_and_fetch(keys, values)
        self.fetched = found
        return found

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        has_mask = mask is not None or self.was_asked_for_mask
        self.attention = AttentionShape(queries.shape[1], scale, sinks is not None, has_mask)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


class _HidingCache(RecordingCache):
    """Computes attention itself and returns NaN for keys and values: whoever else reads them spoils the logits."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.held = super().update_and_fetch(keys, values)
        hidden_keys, hidden_values = (mx.full(array.shape, float("nan"), array.dtype) for array in self.held)
        self.fetched = hidden_keys, hidden_values
        return hidden_keys, hidden_values

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        return super().attend(queries, *self.held, scale=scale, mask=mask, sinks=sinks)


def inspect_layers(model: nn.Module, *, batched: bool) -> ModelLayers:
    """Run a token through `model` and describe its layers; if not `batched`, all of them as the library's own."""
    prototypes = make_prompt_cache(model)
    groups = tuple(len(cache.caches) if isinstance(cache, CacheList) else 0 for cache in prototypes)
    layers = ModelLayers((), groups, 0)
    flat = flat_caches(model)
    probes = [RecordingCache(_window(part)) if _holds_tokens(part) else part for part in flat]
    logits = model(mx.array([[0]]), cache=layers.fold(probes))
    mx.eval(logits)
    shapes = tuple(_shape(part, probe) for part, probe in zip(flat, probes, strict=True))
    if not batched or any(shape.spec.layout is Layout.OWN for shape in shapes):
        # One layer that only the library understands forces single-sequence decoding, so all may stay with it.
        shapes = tuple(LayerShape(LayerSpec(Layout.OWN)) for _ in shapes)
    elif _shares_keys(model, layers, shapes):
        shapes = tuple(_out_of_pages(shape) for shape in shapes)
    return ModelLayers(shapes, groups, logits.shape[-1])


def flat_caches(model: nn.Module) -> list[Any]:
    """The library's own empty caches of one sequence, composite ones taken apart."""
    return parts_of(make_prompt_cache(model))


def parts_of(caches: Iterable[Any]) -> list[Any]:
    """The library's caches, composite ones taken apart."""
    return [part for cache in caches for part in (cache.caches if isinstance(cache, CacheList) else (cache,))]


def _shares_keys(model: nn.Module, layers: ModelLayers, shapes: tuple[LayerShape, ...]) -> bool:
    """Whether anything but a layer's own attention reads what a layer in pages returns."""
    if not any(shape.spec.layout is Layout.PAGES for shape in shapes):
        return False
    flat = zip(flat_caches(model), shapes, strict=True)
    probes = [_HidingCache() if shape.spec.layout is Layout.PAGES else cache for cache, shape in flat]
    return bool(mx.isnan(model(mx.array([[0]]), cache=layers.fold(probes))).any())


def _out_of_pages(shape: LayerShape) -> LayerShape:
    if shape.spec.layout is not Layout.PAGES:
        return shape
    return msgspec.structs.replace(shape, spec=LayerSpec(Layout.ROWS, shape.spec.window), bits=None)


def _quantised(shape: LayerShape, bits: int) -> LayerShape:
    if shape.spec.layout is not Layout.PAGES:
        return shape
    try:
        packing_of(bits, key_dim=shape.key_dim, value_dim=shape.value_dim)
    except ValueError:
        return shape
    return msgspec.structs.replace(shape, bits=bits)


def _holds_tokens(cache: Any) -> bool:
    """Whether it is a plain key/value cache, whole or with a sliding window."""
    return type(cache) is KVCache or (type(cache) is RotatingKVCache and cache.keep == 0)


def _window(cache: Any) -> int | None:
    return cache.max_size if isinstance(cache, RotatingKVCache) else None


def narrower(one: int | None, other: int | None) -> int | None:
    """The window that holds where a layer has one and the model asks for another; None is no window."""
    return min((window for window in (one, other) if window is not None), default=None)


def _shape(cache: Any, probe: Any) -> LayerShape:
    if isinstance(probe, RecordingCache):
        window = _window(cache)
        if probe.keys is None:
            return LayerShape(LayerSpec(Layout.ROWS, window))
        layout = Layout.ROWS if probe.attention is None else Layout.PAGES
        _, heads, _, key_dim = probe.keys.shape
        spec, value_dim = LayerSpec(layout, window), probe.values.shape[-1]
        return LayerShape(spec, heads, key_dim, value_dim, probe.keys.dtype, probe.attention)
    if isinstance(cache, ArraysCache):
        return LayerShape(LayerSpec(Layout.STATE))
    return LayerShape(LayerSpec(Layout.OWN))
