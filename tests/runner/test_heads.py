"""The kernel between projection and attention, executed without a Mac and compared with the library's modules."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from runner.heads_cases import HEADS_CASES, HEADS_LIMITS, check_against
from runner.metal.stand_in import MetalStandIn
from runner.metal.support import emulator_for_tests

from vllm_mlx.runner.kernels import heads

POOLS = {"key_pool", "value_pool"}


@pytest.fixture
def metal(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> MetalStandIn:
    stand_in = MetalStandIn(emulator_for_tests(pytestconfig, tmp_path_factory), in_place=POOLS)
    monkeypatch.setattr(mx.fast, "metal_kernel", stand_in)
    return stand_in


@pytest.mark.parametrize(
    ("rope", "dim", "dtype", "norm_eps"),
    HEADS_CASES,
)
def test_heads_are_what_the_modules_make_of_them(
    metal: MetalStandIn, rope: nn.Module, dim: int, dtype: str, norm_eps: float | None
) -> None:
    found = check_against(rope, "metal", dim=dim, dtype=dtype, norm_eps=norm_eps)
    assert found.problem is None
    assert found.error <= HEADS_LIMITS[dtype]
    assert metal.num_launches == 1


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("first * cosine - second * sine", "first * cosine + second * sine"),
        ("+ slots[row]", "+ row"),
        ("float(key_norm[at])", "float(query_norm[at])"),
        ("squares / DIM", "squares"),
    ],
)
def test_self_check_tells_what_is_wrong(
    metal: MetalStandIn, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    assert right in heads.BODY, "the kernel has changed: this test needs another way to break it"
    monkeypatch.setattr(heads, "BODY", heads.BODY.replace(right, wrong))
    found = check_against(nn.RoPE(64), "metal", dim=64, dtype="float32", norm_eps=1e-5)
    assert "differs from plain operations by" in (found.problem or "")
    assert found.name == "heads 64, 4/2 heads, float32, normalised"


def test_a_kernel_that_does_not_compile_is_not_used(metal: MetalStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "BODY", heads.BODY + "nonsense")
    assert check_against(nn.RoPE(64), "metal", dim=64, dtype="float32").problem
