"""In which form a model's weights are held: quantised as stored, or expanded to the type that is computed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vllm_mlx.core.errors import ModelError
from vllm_mlx.runner import fold_timing, quantised
from vllm_mlx.runner.device import GIB, Device
from vllm_mlx.runner.fold_timing import DeviceStopwatch, Stopwatch

EXPANDED_SHARE = 0.5
"""Weights are expanded without being asked to if the result takes at most this part of the memory."""

EXPANDED: Mapping[type, Callable[[Any, mx.array], nn.Module]] = {
    nn.QuantizedLinear: lambda layer, weight: nn.Linear(*weight.shape[::-1], bias="bias" in layer),
    nn.QuantizedEmbedding: lambda _, weight: nn.Embedding(*weight.shape),
    QuantizedSwitchLinear: lambda layer, weight: SwitchLinear(*weight.shape[::-1], bias="bias" in layer),
    QuantizedMultiLinear: lambda _, weight: MultiLinear(*weight.shape[::-1]),
}
"""The library's quantised classes, and what computes the same with the weight expanded. Not their subclasses."""

PACKED = ("weight", "scales", "biases", "global_scale")
"""Parameters that an expanded weight stands for."""

Paths = Sequence[str]
"""Where quantised layers are in the model. Modules are not kept: what is expanded has to be freed."""


def prepare(
    model: nn.Module,
    wanted: str,
    *,
    found: Device,
    dtype: mx.Dtype | None,
    memory_bytes: int,
    stopwatch: Stopwatch | None = None,
) -> list[str]:
    """Bring the weights of a model that was loaded lazily into memory, in the form that was asked for.

    Args:
        model: the model, changed in place.
        wanted: `Config.weights_dtype`.
        found: the device.
        dtype: the type to compute in; None for what is stored.
        memory_bytes: what weights, cache and temporaries may take together.
        stopwatch: times products; the device's own clock if not given.

    Returns:
        Notes for the banner.

    Raises:
        ModelError: expanded weights were asked for and do not fit.
    """
    paths = [path for path, module in model.named_modules() if type(module) in EXPANDED]
    computed = dtype or _common_dtype(model)
    notes: list[str] = []
    if paths and wanted not in ("auto", "stored"):
        notes = _expand_as_asked(model, paths, wanted, dtype=computed, memory_bytes=memory_bytes)
    elif paths and not found.is_gpu:
        notes = _prepare_on_cpu(model, paths, wanted, dtype=computed, memory_bytes=memory_bytes)
    if dtype is not None:
        cast(model, dtype)
    mx.eval(model.parameters())
    if found.is_gpu and quantised.foldable(model):
        may_expand = wanted == "auto" and found.backend == "cuda"
        budget_bytes = int(EXPANDED_SHARE * memory_bytes) if may_expand else 0
        notes += _measure_and_fold(model, stopwatch, dtype=computed, budget_bytes=budget_bytes)
    return notes


def _expand_as_asked(model: nn.Module, paths: Paths, wanted: str, *, dtype: mx.Dtype, memory_bytes: int) -> list[str]:
    size = expanded_bytes(model, paths, dtype)
    if size > memory_bytes:
        raise ModelError(
            f"--weights-dtype {wanted}: the weights would take {_gib(size)} of the {_gib(memory_bytes)} that may "
            "be used; --weights-dtype stored keeps them quantised"
        )
    return _expanded(model, paths, dtype, reason=f"--weights-dtype {wanted}")


def _prepare_on_cpu(model: nn.Module, paths: Paths, wanted: str, *, dtype: mx.Dtype, memory_bytes: int) -> list[str]:
    """On a CPU, MLX multiplies quantised weights many times slower than expanded ones."""
    if wanted == "stored":
        return ["weights stay quantised (--weights-dtype stored; slow on a CPU)"]
    size = expanded_bytes(model, paths, dtype)
    if size > EXPANDED_SHARE * memory_bytes:
        return [f"weights stay quantised: {_gib(size)} in {_name(dtype)} would not fit (slow on a CPU)"]
    return _expanded(model, paths, dtype, reason="faster on a CPU")


def _measure_and_fold(
    model: nn.Module, stopwatch: Stopwatch | None, *, dtype: mx.Dtype, budget_bytes: int
) -> list[str]:
    """Expand the model's matrices if that is faster and fits into the budget, else fold rows where that is faster."""
    paths = [path for path, _ in quantised.foldable(model)]
    fits = expanded_bytes(model, paths, dtype) <= budget_bytes
    measured = fold_timing.measure(model, stopwatch or DeviceStopwatch(dtype), expanded=fits)
    gains = fold_timing.expanded_gains(measured)
    if fits and fold_timing.should_expand(gains):
        figures = ", ".join(f"{gain:.2f} times at {rows} rows" for rows, gain in gains.items())
        notes = _expanded(model, paths, dtype, reason=f"products measured faster: {figures}")
    else:
        num_folded = quantised.install(model, fold_timing.choose(measured))
        notes = [f"{num_folded} of {len(paths)} quantised layers multiply rows as one matrix (measured faster)"]
    mx.clear_cache()
    return notes


def _expanded(model: nn.Module, paths: Paths, dtype: mx.Dtype, *, reason: str) -> list[str]:
    expand(model, paths, dtype)
    return [f"quantised weights expanded to {_name(dtype)} ({reason})"]


def expand(model: nn.Module, paths: Paths, dtype: mx.Dtype) -> None:
    """Replace quantised layers, one after the other: no more than one is in memory in both forms."""
    modules = dict(model.named_modules())
    for path in paths:
        module = modules.pop(path)
        weight = dequantised(module, dtype)
        dense = EXPANDED[type(module)](module, weight)
        dense.weight = weight
        if "bias" in module:
            dense.bias = module.bias.astype(dtype)
        mx.eval(dense.parameters())
        model.update_modules(tree_unflatten([(path, dense.eval())]))


def dequantised(module: Any, dtype: mx.Dtype) -> mx.array:
    """The weight of a quantised layer, computed in float32 and rounded once."""
    settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode, "dtype": mx.float32}
    scales, biases = _float32(module.scales), module.get("biases")
    tensor_scales = module.get("global_scale")
    if tensor_scales is None:
        biases = None if biases is None else _float32(biases)
        return mx.dequantize(module.weight, scales, biases, **settings).astype(dtype)
    each = zip(module.weight, scales, tensor_scales, strict=True)
    experts = [mx.dequantize(weight, scale, None, **settings, global_scale=one) for weight, scale, one in each]
    return mx.stack(experts).astype(dtype)


def _float32(scales: mx.array) -> mx.array:
    """Scales in float32; those of the floating-point modes are bytes and stay."""
    return scales.astype(mx.float32) if mx.issubdtype(scales.dtype, mx.floating) else scales


def expanded_bytes(model: nn.Module, paths: Paths, dtype: mx.Dtype) -> int:
    """Bytes of all parameters with these layers expanded."""
    modules = dict(model.named_modules())
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    for module in (modules[path] for path in paths):
        packed = sum(array.nbytes for name, array in module.items() if name in PACKED)
        total += module.weight.size * 32 // module.bits * dtype.size - packed
    return int(total)


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Give floating-point weights this type; the model may keep some in float32 (`cast_predicate`)."""
    may_cast = getattr(model, "cast_predicate", lambda _: True)

    def cast_one(key: str, array: mx.array) -> mx.array:
        is_float = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if is_float and (dtype == mx.float32 or may_cast(key)) else array

    model.update(tree_map_with_path(cast_one, model.parameters()))


def _common_dtype(model: nn.Module) -> mx.Dtype:
    """The floating-point type of most arrays, scales included; bfloat16 if there is none."""
    floats = [array.dtype for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)]
    return max(set(floats), key=floats.count, default=mx.bfloat16)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
