"""Projections of the same input merged into one product, and weights that are not transposed at every step.

On a GPU a decode step costs what its operations cost to launch. A model asks for queries, keys and values, or for the
gate and the input of its MLP, as products of their own; side by side in one weight they are one. Which layers get the
same input is found out by running the model on a few tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx.utils import tree_unflatten

from vllm_mlx.core.log import get_logger
from vllm_mlx.runner.kernels.split import SplitKernel, checked_split
from vllm_mlx.runner.quantised import shared_as

log = get_logger("runner")

MERGED_ARRAYS = ("weight", "scales", "biases", "bias")
"""Parameters that have a row per output."""


class TransposedLinear(nn.Linear):  # type: ignore[misc]
    """A linear layer that keeps a transposed view of its weight: one operation less."""

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs [..., out_dims] of activations [..., in_dims]."""
        result: mx.array = mx.addmm(self.bias, x, self._transposed) if "bias" in self else x @ self._transposed
        return result


class MergedPart(nn.Module):  # type: ignore[misc]
    """Stands where a projection stood; takes its part of the merged product. The first part owns the merged layer."""

    def __init__(self, shared: _Shared, index: int) -> None:
        super().__init__()
        self.shared = shared
        self._index = index

    def __call__(self, x: mx.array) -> mx.array:
        """Outputs [..., out_dims] of activations [..., in_dims]."""
        return self.shared.part(self._index, x)


class _Shared:
    """The parts of the merged layer's last product that nobody has taken yet."""

    def __init__(self, bounds: list[int]) -> None:
        self.owner: weakref.ref[MergedPart]
        """Whoever has the merged layer: what is put in its place later (folded, expanded, transposed) is used."""
        self.bounds = bounds
        self.kernel: SplitKernel | None = None
        """Takes products of several rows apart."""
        self.instead: Callable[[mx.array], list[mx.array] | None] | None = None
        """Asked first for the parts of a product."""
        self._input: mx.array | None = None
        self._parts: dict[int, mx.array] = {}

    def part(self, index: int, x: mx.array) -> mx.array:
        if x is not self._input or index not in self._parts:
            self._input = x
            owner = self.owner()
            assert owner is not None, "a part outlives the model"
            self._parts = dict(enumerate(self._split(owner.merged(x))))
        taken = self._parts.pop(index)
        if not self._parts:
            self._input = None  # nobody else will ask: do not keep it alive
        return taken

    def _split(self, product: mx.array) -> list[mx.array]:
        parts = self.instead(product) if self.instead is not None else None
        if parts is not None:
            return parts
        kernel = self.kernel
        if kernel is not None and product.ndim == 3 and product.shape[0] > 1 and product.dtype == kernel.dtype:
            return kernel(product)
        return list(mx.split(product, self.bounds, axis=-1))


class _Call(msgspec.Struct, frozen=True, eq=False):
    path: str
    module: nn.Module
    x: mx.array


class _RecordedLinear(nn.Linear):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        self._record(x)
        result: mx.array = super().__call__(x)
        return result


class _RecordedQuantizedLinear(nn.QuantizedLinear):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        self._record(x)
        result: mx.array = super().__call__(x)
        return result


RECORDED = {nn.Linear: _RecordedLinear, nn.QuantizedLinear: _RecordedQuantizedLinear}
SPLIT_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
TOLERANCE = 0.1
"""Largest relative difference, in norm, of the logits with merged projections. Sums may be added in another order,
which in bfloat16 grows to 0.03 through 28 layers; with a part in the wrong place the logits have nothing in common."""
TRIED = ((0, 1, 2, 3),)
"""What a model is tried on. Attention of a lone token to itself depends on neither its query nor its key."""


def merge_projections(model: nn.Module) -> int:
    """Merge what can be merged; returns how many products were saved.

    Only layers of the library's exact classes are merged, of one kind, with one parent, called once each with the very
    same array. Names of parameters change: adapters are applied before. A model that does not compute the same
    afterwards, or looks into its layers and no longer runs, is left as it was.
    """
    with _unless_changed(model) as change:
        for group in _groups(_record(model)):
            linear, bounds = _merged([call.module for call in group])
            shared = _Shared(bounds)
            parts = [(call.path, MergedPart(shared, index)) for index, call in enumerate(group)]
            owner = parts[0][1]
            owner.merged, shared.owner = linear, weakref.ref(owner)
            model.update_modules(tree_unflatten(parts))
            mx.eval(linear.parameters())
            _share(linear, bounds, [call.module for call in group])
            change.num_saved += len(group) - 1
    return change.num_saved


def split_by_kernel(model: nn.Module, backend: str) -> int:
    """Take merged queries, keys and values apart by a kernel; returns for how many layers.

    MLX's operations on a part of a product of several rows copy it first, each its own. Gate and input of an MLP go
    into one operation together, which needs no copies. Called when weights have their last type.
    """
    kernels: dict[tuple[Any, ...], SplitKernel | None] = {}
    num_layers = 0
    for _, module in model.named_modules():
        if not isinstance(module, MergedPart) or "merged" not in module or len(module.shared.bounds) < 2:
            continue
        linear, ends = module.merged, (*module.shared.bounds, module.merged.weight.shape[0])
        widths = tuple(end - begin for begin, end in zip((0, *ends), ends, strict=False))
        key = widths, linear["scales" if "scales" in linear else "weight"].dtype
        if key not in kernels:
            kernels[key] = checked_split(*key, backend) if key[1] in SPLIT_DTYPES else None
        module.shared.kernel = kernels[key]
        num_layers += kernels[key] is not None
    return num_layers


def keep_transposed(model: nn.Module) -> int:
    """Give every linear layer a transposed view of its weight; returns how many there are."""
    layers = [
        (path, shared_as(TransposedLinear, module))
        for path, module in _linear_layers(model)
        if type(module) is nn.Linear
    ]
    for _, module in layers:
        module._transposed = module.weight.T
    mx.eval([module._transposed for _, module in layers])
    with _unless_changed(model) as change:
        model.update_modules(tree_unflatten(layers))
        change.num_saved = len(layers)
    return change.num_saved


class _Change:
    """What a change of the model brought."""

    def __init__(self) -> None:
        self.num_saved = 0


@contextmanager
def _unless_changed(model: nn.Module) -> Iterator[_Change]:
    """Take back what is done to the linear layers if the model computes something else afterwards, or fails."""
    layers, expected, change = _linear_layers(model), _logits(model), _Change()
    mx.eval(expected)
    yield change
    try:
        difference = mx.linalg.norm(_logits(model) - expected) / mx.maximum(mx.linalg.norm(expected), 1e-6)
        is_same = bool((difference <= TOLERANCE).item())
    except (AttributeError, KeyError, TypeError, ValueError):
        is_same = False
    if not is_same:
        log.warning("projections are kept as they are: the model computes something else with merged ones")
        model.update_modules(tree_unflatten(layers))
        change.num_saved = 0


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers of the library's exact classes. Its subclasses, and others', are left alone."""
    return [(path, module) for path, module in model.named_modules() if type(module) in RECORDED]


def _logits(model: nn.Module) -> mx.array:
    """Float32 logits of a few tokens."""
    logits: mx.array = model(mx.array(TRIED))
    return logits.astype(mx.float32).reshape(-1)


def _record(model: nn.Module) -> list[_Call]:
    """Every call of a linear layer while the model computes a few tokens."""
    layers = _linear_layers(model)
    calls: list[_Call] = []
    recorded = []
    for path, module in layers:
        recorder = shared_as(RECORDED[type(module)], module)
        recorder._record = lambda x, path=path, module=module: calls.append(_Call(path, module, x))
        recorded.append((path, recorder))
    model.update_modules(tree_unflatten(recorded))
    try:
        mx.eval(_logits(model))
    finally:
        model.update_modules(tree_unflatten(layers))
    return calls


def _groups(calls: Sequence[_Call]) -> list[list[_Call]]:
    """Calls of one parent's layers, of one kind, with the same input; layers called more than once are left out."""
    counts: dict[str, int] = {}
    groups: dict[tuple[Any, ...], list[_Call]] = {}
    for call in calls:
        counts[call.path] = counts.get(call.path, 0) + 1
        parent = call.path.rpartition(".")[0]
        groups.setdefault((parent, id(call.x), *_kind(call.module)), []).append(call)
    return [group for group in groups.values() if len(group) > 1 and all(counts[call.path] == 1 for call in group)]


def _kind(module: Any) -> tuple[Any, ...]:
    """What layers must have in common to be one."""
    names = tuple(name for name in MERGED_ARRAYS if name in module)
    packing = tuple(getattr(module, name, None) for name in ("bits", "group_size", "mode"))
    return type(module), names, tuple(module[name].dtype for name in names), packing, "global_scale" in module


def _merged(modules: Sequence[Any]) -> tuple[nn.Module, list[int]]:
    """One layer with the outputs of all, and where the second, third, ... begin."""
    first = modules[0]
    merged = shared_as(type(first), first)
    for name in MERGED_ARRAYS:
        if name in first:
            merged[name] = mx.concatenate([module[name] for module in modules])
    widths = [module.weight.shape[0] for module in modules]
    return merged, [sum(widths[: i + 1]) for i in range(len(widths) - 1)]


def _share(merged: Any, bounds: Sequence[int], modules: Sequence[Any]) -> None:
    """Make the layers that were merged, kept for the case that it is taken back, views of the merged one."""
    for module, begin, end in zip(modules, (0, *bounds), (*bounds, merged.weight.shape[0]), strict=True):
        for name in MERGED_ARRAYS:
            if name in module:
                module[name] = merged[name][begin:end]
