"""Where a model's attention can hand its merged product to one kernel (`kernels/heads`), and how it is made to.

Between the product and the call of its cache, a model's attention takes queries, keys and values apart, normalises
heads and turns them; then the cache writes. While a batch is decoded one kernel does all of that: the projections give
out queries that are done, and keys and values that nobody reads, and the modules in between let everything through.
Whether a model does just that is found out by running it and comparing arrays, not by knowing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from vllm_mlx.core.log import get_logger
from vllm_mlx.runner.kernel_pages import KernelBatchView, Kernels
from vllm_mlx.runner.kernels.heads import HeadsKernel, HeadsVariant
from vllm_mlx.runner.layers import LayerShape, ModelLayers, RecordingCache
from vllm_mlx.runner.projections import MergedPart

log = get_logger("runner")
NORM_NAMES = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"))
PREFIX, NEXT = (1, 2, 3, 4, 5), 6
"""What a model is tried on: the last token's queries and keys are turned, those of a first one would not be."""


class Rotation(msgspec.Struct, frozen=True, eq=False):
    """How a module turns heads."""

    dims: int
    is_traditional: bool
    rates: mx.array
    """Radians per position, float32 [dims / 2]."""
    factor: float = 1.0
    """Of the elements that turn, before they do."""


def rotation_of(module: nn.Module) -> Rotation | None:
    """What a module of the library's does; None if it is another, or does more."""
    if type(module) is nn.RoPE:
        rates = module.scale * float(module.base) ** (-np.arange(0, module.dims, 2, dtype=np.float64) / module.dims)
    elif type(module) in (Llama3RoPE, YarnRoPE):
        rates = 1 / np.array(module._freqs, np.float64)
    else:
        return None
    factor = module.mscale if type(module) is YarnRoPE else 1.0
    return Rotation(module.dims, module.traditional, mx.array(rates.astype(np.float32)), factor)


def norm_weight(module: nn.Module) -> mx.array | None:
    """The weight [dim] by which a root mean square norm multiplies (Gemma's is one more than what it keeps); None if
    the module is no such norm.
    """
    weight, eps = module.get("weight"), getattr(module, "eps", None)
    if not isinstance(weight, mx.array) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    x = mx.random.normal((3, weight.size), key=mx.random.key(0)).astype(weight.dtype)
    found = module(x)
    candidates = (weight, 1.0 + weight)
    return next((w for w in candidates if mx.array_equal(found, mx.fast.rms_norm(x, w, eps)).item()), None)


class FusedLayer:
    """The attention of one layer, from its product to what its cache is asked."""

    def __init__(
        self, kernel: HeadsKernel, rates: mx.array, norms: tuple[mx.array, ...], bounds: Sequence[int]
    ) -> None:
        self._kernel = kernel
        self._rates = rates
        self._norms = norms
        self._bounds = list(bounds)
        self.view: KernelBatchView | None = None
        """The layer's cache while a batch is decoded."""

    def take(self, product: mx.array) -> list[mx.array] | None:
        """Queries that are done, and keys and values that are not to be read; None while no batch is decoded."""
        if self.view is None:
            return None
        queries = self.view.enter(partial(self._kernel, product, rates=self._rates, norms=self._norms))
        _, keys, values = mx.split(product, self._bounds, axis=-1)
        return [queries, keys, values]


class Passing(nn.Module):  # type: ignore[misc]
    """Stands where a module stood whose work is done already while a batch is decoded."""

    def __init__(self, inner: nn.Module, layer: FusedLayer) -> None:
        super().__init__()
        self.inner = inner
        self._layer = layer

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """`x` itself while a batch is decoded, else what the module makes of it."""
        return x if self._layer.view is not None else self.inner(x, *args, **kwargs)


class FusedHeads:
    """All layers of a model that are fused, by number."""

    def __init__(self, layers: dict[int, FusedLayer]) -> None:
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def reading(self, views: Sequence[KernelBatchView]) -> Iterator[None]:
        """For the time that a batch is decoded through `views`, those of all layers."""
        for number, layer in self._layers.items():
            layer.view = views[number]
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.view = None


def fuse_heads(model: nn.Module, layers: ModelLayers, kernels: Kernels) -> FusedHeads:
    """Fuse what can be; all layers must be in pages. The model computes what it did, in one launch for four to six."""
    sites, fused = _find_sites(model, layers), {}
    checked: dict[HeadsVariant, HeadsKernel | None] = {}
    for site in sites:
        if site.variant not in checked:
            checked[site.variant] = _checked(site, kernels)
        kernel = checked[site.variant]
        if kernel is None:
            continue
        layer = FusedLayer(kernel, site.rotation.rates, site.norm_weights, site.owner.shared.bounds)
        site.owner.shared.instead = layer.take
        passing = [(path, Passing(module, layer)) for path, module in site.between]
        model.update_modules(tree_unflatten(passing))
        fused[site.number] = layer
    return FusedHeads(fused)


def _checked(site: _Site, kernels: Kernels) -> HeadsKernel | None:
    """The kernel of a site, tried on this device; None, with a warning, if it does not do what it should."""
    check = kernels.check_heads(site.variant, rates=site.rotation.rates, norms=site.norm_weights, plain=site.plain)
    if check.problem is None:
        return kernels.heads(site.variant)
    log.warning(f"kernel '{check.name}' is not used, decoding takes more launches: {check.problem}")
    return None


class _Site:
    """A layer's attention module that might be fused: its merged projection, and what comes after it."""

    def __init__(self, path: str, owner: MergedPart, model: nn.Module) -> None:
        """Raises LookupError or ValueError if something is missing, of another kind, or there more than once."""
        self.owner = owner
        parent = dict(model.named_modules())[path]
        children = {name: child for name, child in parent.children().items() if isinstance(child, nn.Module)}
        [rope] = [name for name, child in children.items() if rotation_of(child) is not None] or [None]
        if rope is None:
            raise LookupError(path)
        names = next((pair for pair in NORM_NAMES if all(name in children for name in pair)), ())
        self.rope, self.norms = children[rope], [children[name] for name in names]
        weights = [norm_weight(norm) for norm in self.norms]
        self.norm_weights = tuple(weight for weight in weights if weight is not None)
        if len(self.norm_weights) < len(self.norms):
            raise LookupError(path)
        self.rotation: Rotation = rotation_of(self.rope)  # type: ignore[assignment]
        self.between = [(f"{path}.{name}", children[name]) for name in (rope, *names)]
        self.product: mx.array | None = None
        """The last one."""
        self.turned: list[mx.array] = []
        """What the rope returned since."""
        self.number = -1
        """Of the layer."""
        self.variant: HeadsVariant

    def describe(self, number: int, shape: LayerShape) -> bool:
        """Note which layer it is; False if no kernel has its shape."""
        assert shape.attention is not None
        norms = {norm.eps for norm in self.norms}
        dims = {shape.key_dim, shape.value_dim, *(weight.size for weight in self.norm_weights)}
        if shape.bits is not None or len(dims) > 1 or len(norms) > 1 or self.rotation.dims % 2:
            return False
        self.number = number
        as_multiplied: Any = mx.array(self.rotation.factor, shape.dtype).item()  # numbers take the type of the array
        self.variant = HeadsVariant(
            heads=shape.attention.heads,
            kv_heads=shape.heads,
            dim=shape.key_dim,
            dtype=str(shape.dtype).removeprefix("mlx.core."),
            rotary_dims=self.rotation.dims,
            is_traditional=self.rotation.is_traditional,
            factor=as_multiplied,
            norm_eps=norms.pop() if norms else None,
        )
        return True

    def plain(self, joined: mx.array, positions: mx.array | int) -> tuple[mx.array, ...]:
        """Queries, keys and values [rows, heads, 1, dim] of a product by the model's own modules."""
        variant, rows = self.variant, joined.shape[0]
        parts = mx.split(joined, self.owner.shared.bounds, axis=-1)
        queries, keys, values = (part.reshape(rows, 1, -1, variant.dim) for part in parts)
        if self.norms:
            queries, keys = self.norms[0](queries), self.norms[1](keys)
        queries, keys, values = (part.transpose(0, 2, 1, 3) for part in (queries, keys, values))
        return self.rope(queries, offset=positions), self.rope(keys, offset=positions), values


class _Noting(nn.Module):  # type: ignore[misc]
    """A rope whose outputs are noted."""

    def __init__(self, site: _Site) -> None:
        super().__init__()
        self._site = site

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        self._site.turned.append(self._site.rope(*args, **kwargs))
        return self._site.turned[-1]


class _NotingCache(RecordingCache):
    """Notes what a layer's attention gives to its cache."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.given = keys, values
        return super().update_and_fetch(keys, values)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, **how: Any) -> mx.array:
        self.queries = queries
        return super().attend(queries, keys, values, **how)


def _find_sites(model: nn.Module, layers: ModelLayers) -> list[_Site]:
    """The attention modules that do nothing between product and cache but what the kernel does."""
    sites = []
    for path, module in model.named_modules():
        if isinstance(module, MergedPart) and "merged" in module and len(module.shared.bounds) == 2:
            try:
                sites.append(_Site(path.rpartition(".")[0], module, model))
            except (LookupError, ValueError):
                continue
    if not sites:
        return []
    caches = [_NotingCache(shape.spec.window) for shape in layers.shapes]
    with _noted(model, sites):
        for tokens in (PREFIX, (NEXT,)):
            for site in sites:
                site.turned.clear()
            mx.eval(model(mx.array([tokens]), cache=layers.fold(list(caches))))
    found = []
    for number, (cache, shape) in enumerate(zip(caches, layers.shapes, strict=True)):
        own = [site for site in sites if any(cache.given[0] is turned for turned in site.turned)]
        found += [site for site in own if site.describe(number, shape) and _is_all(site, cache)]
    return found


def _is_all(site: _Site, cache: _NotingCache) -> bool:
    """Whether what the cache was given is what the kernel would make of the product."""
    assert site.product is not None
    if site.product.dtype != cache.given[0].dtype:
        return False
    try:
        expected = site.plain(site.product, len(PREFIX))
    except ValueError:  # the parts have other shapes
        return False
    return all(bool(mx.array_equal(*pair).item()) for pair in zip(expected, (cache.queries, *cache.given), strict=True))


@contextmanager
def _noted(model: nn.Module, sites: Sequence[_Site]) -> Iterator[None]:
    """Have sites note their products and what their ropes return."""

    def note(site: _Site, product: mx.array) -> None:
        site.product = product

    model.update_modules(tree_unflatten([(site.between[0][0], _Noting(site)) for site in sites]))
    for site in sites:
        site.owner.shared.instead = partial(note, site)
    try:
        yield
    finally:
        for site in sites:
            site.owner.shared.instead = None
        model.update_modules(tree_unflatten([site.between[0] for site in sites]))
