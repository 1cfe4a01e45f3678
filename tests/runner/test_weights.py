"""Weights packed or expanded: what is asked for, what a device gains from, what fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vllm_mlx.core.errors import ModelError
from vllm_mlx.runner.device import GIB, Device
from vllm_mlx.runner.fold_timing import EXPANDED_ROW_COUNTS
from vllm_mlx.runner.quantised import FoldedEmbedding, FoldedLinear, Way
from vllm_mlx.runner.weights import dequantised, expanded_bytes, prepare

CPU, CUDA, METAL = (Device(backend, backend, 8 * GIB) for backend in ("cpu", "cuda", "metal"))
MODES = [("affine", 64, 2), ("affine", 32, 3), ("affine", 64, 8), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
MATRICES = ("embed_tokens", "proj")
OTHERS = ("experts", "heads")


class Layers(nn.Module):
    """One of every quantised layer, and a norm."""

    def __init__(self, mode: str = "affine", group_size: int = 64, bits: int = 4) -> None:
        super().__init__()
        mx.random.seed(0)
        self.embed_tokens = nn.Embedding(96, 64)
        self.proj = nn.Linear(64, 128)
        self.experts = SwitchLinear(64, 32, 4)
        self.heads = MultiLinear(64, 32, 2)
        self.norm = nn.RMSNorm(64)
        self.set_dtype(mx.bfloat16)
        nn.quantize(self, group_size, bits, mode=mode)

    def outputs(self) -> list[mx.array]:
        x = mx.random.normal((3, 1, 64), key=mx.random.key(1))
        indices = mx.array([[0, 3], [1, 1], [2, 0]])
        return [
            self.embed_tokens(mx.array([5, 7])),
            self.embed_tokens.as_linear(x),
            self.proj(x),
            self.experts(x[:, :, None, None], indices[:, None]),
            self.heads(mx.broadcast_to(x, (3, 2, 64))[:, :, None]),
        ]


class Watch:
    """Times by way; None stands for expanded weights."""

    def __init__(self, *, straight: float = 1.0, expanded: float = 1.0) -> None:
        self.seconds = {Way.STRAIGHT: straight, Way.FOLD: 1.0, Way.PAD: 5.0, None: expanded}
        self.asked: set[Way | None] = set()

    def __call__(self, modules: Sequence[Any], rows: int, way: Way | None) -> float:
        self.asked.add(way)
        return self.seconds[way] if rows > 1 or way is None else 1.0


def forms(model: Layers) -> dict[str, type]:
    return {name: type(model[name]) for name in (*MATRICES, *OTHERS)}


QUANTISED = {
    "embed_tokens": nn.QuantizedEmbedding,
    "proj": nn.QuantizedLinear,
    "experts": QuantizedSwitchLinear,
    "heads": QuantizedMultiLinear,
}
FOLDED = {**QUANTISED, "embed_tokens": FoldedEmbedding, "proj": FoldedLinear}
DENSE = {"embed_tokens": nn.Embedding, "proj": nn.Linear, "experts": SwitchLinear, "heads": MultiLinear}


def prepared(
    wanted: str, found: Device, *, watch: Watch | None = None, memory_bytes: int = 8 * GIB, dtype: Any = mx.bfloat16
) -> tuple[Layers, str]:
    model = Layers()
    notes = prepare(model, wanted, found=found, dtype=dtype, memory_bytes=memory_bytes, stopwatch=watch or Watch())
    return model, " | ".join(notes)


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_expanded_weights_compute_the_same(mode: str, group_size: int, bits: int) -> None:
    packed, model = Layers(mode, group_size, bits), Layers(mode, group_size, bits)
    packed.set_dtype(mx.float32)
    notes = prepare(model, "fp32", found=CPU, dtype=mx.float32, memory_bytes=8 * GIB)
    assert notes == ["quantised weights expanded to float32 (--weights-dtype fp32)"]
    assert forms(model) == DENSE
    for ours, expected in zip(model.outputs(), packed.outputs(), strict=True):
        assert ours.shape == expected.shape
        assert mx.allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("wanted", "dtype"), [("bf16", mx.bfloat16), ("fp16", mx.float16), ("fp32", mx.float32)])
@pytest.mark.parametrize("found", [CPU, CUDA, METAL], ids=["cpu", "cuda", "metal"])
def test_weights_are_expanded_everywhere_if_asked(wanted: str, dtype: Any, found: Device) -> None:
    model, notes = prepared(wanted, found, dtype=dtype)
    assert forms(model) == DENSE
    assert {layer.weight.dtype for layer in (model.proj, model.embed_tokens, model.experts, model.norm)} == {dtype}
    assert model.proj.bias.dtype == dtype
    assert f"--weights-dtype {wanted}" in notes


def test_expanding_rounds_once() -> None:
    layer = Layers().proj
    exact = mx.dequantize(
        layer.weight, layer.scales.astype(mx.float32), layer.biases.astype(mx.float32), group_size=64, bits=4
    )
    assert mx.array_equal(dequantised(layer, mx.bfloat16), exact.astype(mx.bfloat16))


def test_a_scale_per_expert_is_heeded() -> None:
    """The values of an expert are its codes times its own scale; 448 * 6 is the largest value of the codes."""
    layer = Layers("nvfp4", 16, 4).experts
    plain = dequantised(layer, mx.float32)
    layer.global_scale = mx.array([2688.0, 1344.0, 26880.0, 1.0])
    expected = plain * (layer.global_scale / 2688)[:, None, None]
    assert mx.allclose(dequantised(layer, mx.float32), expected, rtol=1e-6)


def test_weights_that_would_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match=r"--weights-dtype bf16: .* GiB .*--weights-dtype stored"):
        prepared("bf16", CUDA, memory_bytes=1000)


def test_a_cpu_expands_what_fits_into_half_of_its_memory() -> None:
    model, notes = prepared("auto", CPU, dtype=mx.float32)
    assert forms(model) == DENSE
    assert notes == "quantised weights expanded to float32 (faster on a CPU)"
    needed = expanded_bytes(Layers(), list(QUANTISED), mx.float32)
    assert forms(prepared("auto", CPU, dtype=mx.float32, memory_bytes=2 * needed)[0]) == DENSE
    model, notes = prepared("auto", CPU, dtype=mx.float32, memory_bytes=2 * needed - 2)
    assert forms(model) == QUANTISED
    assert "would not fit" in notes


def test_bytes_are_counted_exactly() -> None:
    expected = expanded_bytes(Layers(), list(QUANTISED), mx.bfloat16)
    model, _ = prepared("bf16", CPU)
    assert expanded_bytes(model, [], mx.bfloat16) == expected


def test_stored_keeps_a_cpu_s_weights_packed_and_says_so() -> None:
    model, notes = prepared("stored", CPU)
    assert forms(model) == QUANTISED
    assert "slow on a CPU" in notes


def test_cuda_expands_matrices_that_are_faster_so_and_fit() -> None:
    model, notes = prepared("auto", CUDA, watch=Watch(expanded=0.5))
    assert forms(model) == {**QUANTISED, "embed_tokens": nn.Embedding, "proj": nn.Linear}
    assert "2.00 times at 1 rows, 2.00 times at 16 rows, 2.00 times at 64 rows" in notes
    assert model.proj.weight.dtype == mx.bfloat16


def test_cuda_folds_rows_where_expanding_gains_nothing() -> None:
    watch = Watch(straight=9.0, expanded=1.5)
    model, notes = prepared("auto", CUDA, watch=watch)
    assert None in watch.asked
    assert forms(model) == FOLDED
    assert [model.proj.rule.way(rows) for rows in (1, 2, 64)] == [Way.STRAIGHT, Way.FOLD, Way.FOLD]
    assert notes == "2 of 2 quantised layers multiply rows as one matrix (measured faster)"


def test_cuda_folds_rows_where_expanded_weights_would_not_fit() -> None:
    watch = Watch(straight=9.0, expanded=0.1)
    needed = expanded_bytes(Layers(), MATRICES, mx.bfloat16)
    model, _ = prepared("auto", CUDA, watch=watch, memory_bytes=2 * needed - 2)
    assert forms(model) == FOLDED
    assert None not in watch.asked
    assert forms(prepared("auto", CUDA, watch=watch, memory_bytes=2 * needed)[0])["proj"] is nn.Linear


@pytest.mark.parametrize(("wanted", "found"), [("stored", CUDA), ("auto", METAL), ("stored", METAL)])
def test_elsewhere_weights_stay_packed(wanted: str, found: Device) -> None:
    watch = Watch(straight=9.0, expanded=0.1)
    model, _ = prepared(wanted, found, watch=watch)
    assert forms(model) == FOLDED
    assert None not in watch.asked


def test_metal_keeps_the_library_s_layers_if_folding_gains_nothing() -> None:
    model, notes = prepared("auto", METAL)
    assert forms(model) == QUANTISED
    assert notes.startswith("0 of 2 ")


def test_the_device_itself_is_measured() -> None:
    model = Layers()
    (note,) = prepare(model, "auto", found=CUDA, dtype=mx.float32, memory_bytes=8 * GIB)
    assert "measured" in note
    assert all(mx.isfinite(output).all() for output in model.outputs())


@pytest.mark.parametrize("wanted", ["auto", "stored", "bf16"])
def test_a_model_without_quantised_weights_is_only_cast(wanted: str) -> None:
    model, watch = nn.Linear(64, 64), Watch()
    assert prepare(model, wanted, found=CUDA, dtype=mx.bfloat16, memory_bytes=1, stopwatch=watch) == []
    assert model.weight.dtype == mx.bfloat16
    assert watch.asked == set()


def test_all_compared_row_counts_are_measured() -> None:
    from vllm_mlx.runner.fold_timing import ROW_COUNTS

    assert set(EXPANDED_ROW_COUNTS) <= set(ROW_COUNTS)
