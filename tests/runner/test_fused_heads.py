"""Attention hands its product to one kernel where it does just what the kernel does, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama
from pure_kernels import PureKernels

from vllm_mlx.core.step import DecodeRow, Runner
from vllm_mlx.runner import attention, projections
from vllm_mlx.runner.fused_heads import Passing, fuse_heads
from vllm_mlx.runner.head_modules import norm_weight, rotation_of
from vllm_mlx.runner.kernel_pages import KernelPages
from vllm_mlx.runner.kernels.check import Check
from vllm_mlx.runner.layers import ModelLayers, inspect_layers

ROWS = (DecodeRow(0, 40, (1, 2), ((4, 5),)), DecodeRow(1, 3, (3,), ((6,),)))
TOKENS = mx.array([[5], [9]])


def load(folder: Path) -> tuple[Any, ModelLayers]:
    """A model as it is loaded for kernels."""
    from vllm_mlx.runner.load import untouched_file_limit

    with untouched_file_limit():
        from mlx_lm.utils import load_model
    model = load_model(folder)[0]
    attention.bind()
    projections.merge_projections(model)
    return model, inspect_layers(model, batched=True)


def pages_of(layers: ModelLayers, kernels: PureKernels) -> KernelPages:
    return KernelPages(layers.paged, kernels=kernels, num_pages=7, num_slots=2, max_pages=2)


@pytest.mark.parametrize(
    "name", ["llama", "llama-rope3", "qwen3", "qwen3_moe", "glm4", "starcoder2", "gpt_oss", "gemma3_text", "qwen2-yarn"]
)
def test_a_decode_step_computes_the_same_in_fewer_operations(name: str, tiny_model: Callable[[str], Path]) -> None:
    model, layers = load(tiny_model(name))
    kernels = PureKernels()
    fused, pages = fuse_heads(model, layers, kernels), pages_of(layers, kernels)
    assert len(fused) == len(layers.shapes)
    views = pages.views(pages.inputs.place(ROWS))
    expected, token = model(TOKENS, cache=views), pages.order.token
    mx.eval(expected, token)
    pages.order.token = token * 0
    views = pages.views(pages.inputs.place(ROWS))
    with fused.reading(views):
        found = model(TOKENS, cache=views)
    assert mx.allclose(found, expected, atol=1e-4)
    assert mx.allclose(pages.order.token, token, atol=1e-4), "other keys or values were written"
    views = pages.views(pages.inputs.place(ROWS))
    assert mx.allclose(model(TOKENS, cache=views), expected, atol=1e-4), "something stays fused"


@pytest.mark.parametrize("name", ["olmo2", "gpt2", "phi3"])
def test_attention_of_another_kind_is_left_alone(name: str, tiny_model: Callable[[str], Path]) -> None:
    model, layers = load(tiny_model(name))
    assert len(fuse_heads(model, layers, PureKernels())) == 0
    assert not any(isinstance(module, Passing) for module in model.modules())


class DoublingRope(nn.RoPE):
    """Does more than its class."""

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        return 2 * super().__call__(x, offset)


class ScaledKeys(llama.Attention):
    """Does something with what the rope made of the keys."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rope = self.rope
        self.rope = lambda heads, offset: 1.0 * rope(heads, offset=offset)
        try:
            return super().__call__(x, mask, cache)
        finally:
            self.rope = rope


def test_what_is_done_with_keys_behind_the_rope_is_not_lost(tiny_model: Callable[[str], Path]) -> None:
    model, layers = load(tiny_model("llama"))
    model.layers[1].self_attn.__class__ = ScaledKeys
    assert len(fuse_heads(model, layers, PureKernels())) == 1


def test_only_the_librarys_own_ropes_are_known() -> None:
    assert rotation_of(nn.RoPE(8)) is not None
    assert rotation_of(DoublingRope(8)) is None
    assert rotation_of(nn.Linear(8, 8)) is None


def test_only_root_mean_square_norms_are_known() -> None:
    norm = nn.RMSNorm(8)
    norm.weight = mx.arange(8).astype(mx.float32)
    assert mx.array_equal(norm_weight(norm), norm.weight)
    assert norm_weight(nn.LayerNorm(8)) is None
    assert norm_weight(nn.RoPE(8)) is None


class Unsound(PureKernels):
    def check_heads(self, variant: Any, **_: Any) -> Check:
        return Check("heads", "made to fail")


def test_a_kernel_that_fails_its_check_is_not_used(
    tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, layers = load(tiny_model("llama"))
    assert len(fuse_heads(model, layers, Unsound())) == 0
    assert "kernel 'heads' is not used, decoding takes more launches: made to fail" in caplog.text


def test_quantised_pages_are_written_by_their_own_kernel(tiny_model: Callable[[str], Path]) -> None:
    model, layers = load(tiny_model("llama"))
    assert len(fuse_heads(model, layers.quantised(8), PureKernels())) == 0


def test_runners_with_kernels_are_fused(open_runner: Callable[..., Runner]) -> None:
    runner: Any = open_runner("qwen3", kernels=PureKernels(), max_num_seqs=2)
    assert sum(isinstance(module, Passing) for module in runner._model.modules()) == 3 * len(runner._model.layers)
