"""Where a model's attention can hand its merged product to one kernel (`kernels/heads`), and how it is made to.

Between the product and the call of its cache, a model's attention takes queries, keys and values apart, normalises
heads and turns them; then the cache writes. While a batch is decoded one kernel does all of that: the projections give
out queries that are done, and keys and values that nobody reads, and the modules in between let everything through.
Whether a model does just that is found out by running it and comparing arrays, not by knowing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from vllm_mlx.core.log import get_logger
from vllm_mlx.runner.head_modules import HeadModules, rotation_of
from vllm_mlx.runner.kernel_pages import KernelBatchView, Kernels
from vllm_mlx.runner.kernels.check import Check
from vllm_mlx.runner.kernels.heads import HeadsKernel, HeadsVariant
from vllm_mlx.runner.layers import LayerShape, ModelLayers, RecordingCache
from vllm_mlx.runner.projections import MergedPart

log = get_logger("runner")
NORM_NAMES = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"))
PREFIX, NEXT = (1, 2, 3, 4, 5), 6
"""What a model is tried on: the last token's queries and keys are turned, those of a first one would not be."""


class FusedLayer:
    """The attention of one layer, from its product to what its cache is asked."""

    def __init__(self, kernel: HeadsKernel, modules: HeadModules, bounds: Sequence[int]) -> None:
        self._make = partial(kernel, rates=modules.rates, norms=modules.norms)
        self._bounds = list(bounds)
        self.view: KernelBatchView | None = None
        """The layer's cache while a batch is decoded."""

    def take(self, product: mx.array) -> list[mx.array] | None:
        """Queries that are done, and keys and values that are not to be read; None while no batch is decoded."""
        if self.view is None:
            return None
        queries = self.view.enter(partial(self._make, product))
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

    def __init__(self, layers: dict[int, FusedLayer] | None = None, checks: Sequence[Check] = ()) -> None:
        self._layers = layers or {}
        self.checks = tuple(checks)
        """How the kernels fared that they need."""

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
    """Fuse what can be, if all layers are in pages. The model computes what it did, in one launch for four to six.

    A kernel that does not do what the modules do is not used, and there is a warning.
    """
    if len(layers.paged) < len(layers.shapes):
        return FusedHeads()
    checks: dict[HeadsVariant, Check] = {}
    fused = {}
    for number, site in _find_sites(model, layers).items():
        modules, variant = site.modules, site.variant
        if variant not in checks:
            plain = modules.plain(variant)
            checks[variant] = kernels.check_heads(variant, rates=modules.rates, norms=modules.norms, plain=plain)
        if checks[variant].problem is None:
            layer = FusedLayer(kernels.heads(variant), modules, site.shared.bounds)
            site.shared.instead = layer.take
            model.update_modules(tree_unflatten([(path, Passing(module, layer)) for path, module in site.between]))
            fused[number] = layer
    for failed in (check for check in checks.values() if check.problem is not None):
        log.warning(f"kernel '{failed.name}' is not used, decoding takes more launches: {failed.problem}")
    return FusedHeads(fused, tuple(checks.values()))


class _Site:
    """A layer's attention module that might be fused: its merged projection, and what comes after it."""

    def __init__(self, path: str, owner: MergedPart, parent: nn.Module) -> None:
        """Raises ValueError if something is missing, of another kind, or there more than once."""
        self.shared = owner.shared
        children = {name: child for name, child in parent.children().items() if isinstance(child, nn.Module)}
        [rope] = [name for name, child in children.items() if rotation_of(child) is not None]
        norms = next((pair for pair in NORM_NAMES if all(name in children for name in pair)), ())
        self.rope = children[rope]
        self.modules = HeadModules(self.rope, [children[name] for name in norms])
        self.between = [(f"{path}.{name}", children[name]) for name in (rope, *norms)]
        """Paths and modules; the rope comes first."""
        self.product: mx.array | None = None
        """The last one."""
        self.turned: list[mx.array] = []
        """What the rope returned since."""
        self.variant: HeadsVariant

    def is_all(self, shape: LayerShape, cache: _NotingCache) -> bool:
        """Whether the layer's cache was given just what the kernel would make of the product, and which kernel."""
        product, (keys, values) = self.product, cache.given
        if product is None or not any(keys is turned for turned in self.turned):
            return False
        if shape.bits is not None or shape.key_dim != shape.value_dim or product.dtype != keys.dtype:
            return False
        assert shape.attention is not None
        try:
            self.variant = self.modules.variant(
                heads=shape.attention.heads, kv_heads=shape.heads, dim=shape.key_dim, dtype=keys.dtype
            )
            expected = self.modules.plain(self.variant)(product, len(PREFIX))
        except ValueError:  # other heads than the modules are for, or than the product has
            return False
        pairs = zip(expected, (cache.queries, keys, values), strict=True)
        return all(bool(mx.array_equal(*pair).item()) for pair in pairs)


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


def _find_sites(model: nn.Module, layers: ModelLayers) -> dict[int, _Site]:
    """By layer, attention modules that do nothing between product and cache but what the kernel does."""
    sites, modules = [], dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, MergedPart) and "merged" in module and len(module.shared.bounds) == 2:
            parent = path.rpartition(".")[0]
            with suppress(ValueError):
                sites.append(_Site(parent, module, modules[parent]))
    if not sites:
        return {}
    caches = [_NotingCache(shape.spec.window) for shape in layers.shapes]
    with _noted(model, sites):
        for tokens in (PREFIX, (NEXT,)):
            for site in sites:
                site.turned.clear()
            mx.eval(model(mx.array([tokens]), cache=layers.fold(list(caches))))
    found = {}
    for number, (cache, shape) in enumerate(zip(caches, layers.shapes, strict=True)):
        own = next((site for site in sites if site.is_all(shape, cache)), None)
        if own is not None:
            found[number] = own
    return found


@contextmanager
def _noted(model: nn.Module, sites: Sequence[_Site]) -> Iterator[None]:
    """Have sites note their products and what their ropes return."""

    def note(site: _Site, product: mx.array) -> None:
        site.product = product

    model.update_modules(tree_unflatten([(site.between[0][0], _Noting(site)) for site in sites]))
    for site in sites:
        site.shared.instead = partial(note, site)
    try:
        yield
    finally:
        for site in sites:
            site.shared.instead = None
        model.update_modules(tree_unflatten([site.between[0] for site in sites]))
