"""Merged projections compute what the model computed, and only what may be merged is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from tiny_models import ARCHITECTURES

from vllm_mlx.runner import projections, weights
from vllm_mlx.runner.projections import (
    MergedPart,
    TransposedLinear,
    keep_transposed,
    merge_projections,
    split_by_kernel,
)

TOKENS = mx.array([[5, 9, 3, 7, 11]])


def load(folder: Path) -> Any:
    from vllm_mlx.runner.load import untouched_file_limit

    with untouched_file_limit():
        from mlx_lm.utils import load_model
    return load_model(folder)[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_stay_the_same(name: str, tiny_model: Callable[[str], Path]) -> None:
    model = load(tiny_model(name))
    before = model(TOKENS)
    mx.eval(before)
    merge_projections(model)
    keep_transposed(model)
    assert mx.allclose(model(TOKENS), before, atol=1e-4)


def test_queries_keys_and_values_are_one_product_and_so_are_gate_and_up(tiny_model: Callable[[str], Path]) -> None:
    model = load(tiny_model("llama"))
    num_bytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert merge_projections(model) == len(model.layers) * 3
    layer = model.layers[0]
    parts = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj)
    assert all(isinstance(part, MergedPart) for part in (*parts, layer.mlp.up_proj))
    assert type(layer.self_attn.o_proj) is nn.Linear
    assert sum(array.nbytes for _, array in tree_flatten(model.parameters())) == num_bytes
    keep_transposed(model)
    assert type(layer.self_attn.o_proj) is TransposedLinear
    assert sum(array.nbytes for _, array in tree_flatten(model.parameters())) == num_bytes


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_projections_are_merged_too(bits: int, tiny_model: Callable[[str], Path]) -> None:
    model = load(tiny_model("llama"))
    nn.quantize(model, group_size=32, bits=bits)
    before = model(TOKENS)
    mx.eval(before)
    assert merge_projections(model) > 0
    assert mx.allclose(model(TOKENS), before, atol=1e-4)


def test_what_takes_the_place_of_a_merged_layer_is_used(tiny_model: Callable[[str], Path]) -> None:
    model = load(tiny_model("llama"))
    nn.quantize(model, group_size=32, bits=4)
    expected = model(TOKENS)
    mx.eval(expected)
    merge_projections(model)
    packed = weakref.ref(model.layers[0].self_attn.q_proj.merged)
    weights.expand(model, [path for path, module in model.named_modules() if "bits" in vars(module)], mx.float32)
    assert packed() is None, "the quantised layer is kept beside the expanded one"
    assert mx.allclose(model(TOKENS), expected, atol=1e-4)
    layer = model.layers[0].self_attn
    layer.q_proj.merged = nn.Linear(64, 128)
    x = mx.random.normal((1, 64))
    assert mx.allclose(layer.k_proj(x), layer.q_proj.merged(x)[:, 64:96])


class TwoInputs(nn.Module):
    """Looks like attention, but feeds its projections differently."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.q_proj = nn.Linear(8, 8)
        self.k_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 4)
        self.o_proj = nn.Linear(4, 16)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        return self.o_proj(self.v_proj(self.q_proj(x) * self.k_proj(x + 1)))


def test_projections_of_different_inputs_are_left_alone() -> None:
    model = TwoInputs()
    assert merge_projections(model) == 0
    assert type(model.q_proj) is nn.Linear


class Peeking(TwoInputs):
    """Looks into its layers while it computes."""

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        return self.o_proj(self.v_proj(self.q_proj(x) * self.k_proj(x) * self.q_proj.weight[0, 0]))


def test_a_model_that_looks_into_its_layers_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = Peeking()
    before = model(TOKENS)
    assert merge_projections(model) == 0
    assert type(model.q_proj) is nn.Linear
    assert mx.array_equal(model(TOKENS), before)
    assert "kept as they are" in caplog.text


class Shifting(TwoInputs):
    """Changes its input in place, which only attention to other tokens shows."""

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        values, queries = self.v_proj(x + 0), self.q_proj(x)
        x += 10 * mx.random.normal(x.shape, key=mx.random.key(0))
        scores = 10 * queries @ self.k_proj(x).swapaxes(-1, -2)
        return self.o_proj(mx.softmax(scores, axis=-1) @ values)


def test_a_wrong_merge_that_one_token_does_not_show_is_taken_back() -> None:
    model = Shifting()
    before = model(TOKENS)
    mx.eval(before)
    assert merge_projections(model) == 0
    assert mx.array_equal(model(TOKENS), before)


class Growing(TwoInputs):
    """Calls a projection twice."""

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        return self.o_proj(self.v_proj(self.q_proj(x) + self.q_proj(x) * self.k_proj(x)))


def test_a_projection_that_is_called_twice_is_left_alone() -> None:
    assert merge_projections(Growing()) == 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(256, 256)
        self.up_proj = nn.Linear(256, 256)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.tanh(self.gate_proj(x)) * self.up_proj(x)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 256)
        self.layers = [Block() for _ in range(12)]

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_weights_are_not_held_twice_while_they_are_merged() -> None:
    model = Deep()
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert merge_projections(model) == 12
    weights_bytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert mx.get_peak_memory() - before < weights_bytes / 4
    assert mx.get_active_memory() - before < weights_bytes / 20


def test_a_part_asked_out_of_turn_computes_its_own() -> None:
    class Model(TwoInputs):
        def __call__(self, tokens: mx.array) -> mx.array:
            x = self.embed(tokens)
            return self.o_proj(self.v_proj(self.q_proj(x) * self.k_proj(x)))

    model = Model()
    x, y = mx.random.normal((3, 8)), mx.random.normal((3, 8))
    expected = model.k_proj(x), model.q_proj(y), model.k_proj(y)
    mx.eval(expected)
    assert merge_projections(model) == 1
    model.q_proj(x)
    found = model.k_proj(x), model.q_proj(y), model.k_proj(y)
    assert all(mx.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


class PlainSplit:
    """What the kernel does, from plain operations."""

    def __init__(self, widths: tuple[int, ...], dtype: mx.Dtype, _backend: str) -> None:
        self.bounds, self.dtype = [sum(widths[: i + 1]) for i in range(len(widths) - 1)], dtype
        self.num_rows: list[int] = []

    def __call__(self, joined: mx.array) -> list[mx.array]:
        assert joined.ndim == 3
        assert joined.dtype == self.dtype
        self.num_rows.append(joined.shape[0])
        return [mx.contiguous(part) for part in mx.split(joined, self.bounds, axis=-1)]


@pytest.mark.parametrize("bits", [None, 4])
def test_queries_keys_and_values_of_several_rows_are_split_by_the_kernel(
    bits: int | None, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: list[PlainSplit] = []
    monkeypatch.setattr(projections, "checked_split", lambda *args: (kernels.append(PlainSplit(*args)), kernels[-1])[1])
    model = load(tiny_model("llama"))
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    merge_projections(model)
    rows = mx.array([[5], [9], [3]])
    expected = model(rows)
    assert split_by_kernel(model, "plain") == len(model.layers)
    assert mx.array_equal(model(rows), expected)
    model(TOKENS)
    [kernel] = kernels
    assert kernel.num_rows == [3] * len(model.layers), "one row needs no copy"


def test_a_kernel_that_fails_is_not_used(tiny_model: Callable[[str], Path]) -> None:
    model = load(tiny_model("llama"))
    merge_projections(model)
    assert split_by_kernel(model, "cuda") == 0
    assert mx.isfinite(model(mx.array([[5], [9]]))).all()
