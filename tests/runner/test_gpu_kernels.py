"""The decode kernels on the GPU of this machine, every kind of variant, against attention as it is defined."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from runner.heads_cases import HEADS_CASES, HEADS_LIMITS, check_against
from runner.kernel_cases import DTYPES, decode_cases, describe, plan_for, positions_for
from runner.metal.attention import LIMITS, Batch, attend, errors, make_batch
from runner.metal.emulator import as_numpy

from vllm_mlx.runner import device
from vllm_mlx.runner.kernels.decode import PagedAttention
from vllm_mlx.runner.kernels.plan import PADDED, DecodePlan, num_items, plan_items
from vllm_mlx.runner.kernels.variant import DecodeVariant

BACKEND = device.probe().backend

pytestmark = pytest.mark.skipif(BACKEND == "cpu", reason="there is no GPU")

CASES = decode_cases()
LONG_ROWS = (5000, PADDED, 1, 700, 2048)


def row_errors(variant: DecodeVariant, batch: Batch, plan: DecodePlan) -> Sequence[float]:
    """Relative error of every row."""
    integers = [mx.array(array) for array in (batch.table, batch.slots, plan.items, plan.starts)]
    table, slots, items, starts = integers
    out = PagedAttention(variant, BACKEND)(
        batch.queries,
        *batch.pools,
        table=table,
        slots=slots,
        items=items,
        starts=starts,
        after=mx.zeros((1,), mx.int32),
        sinks=batch.sinks,
        scales=batch.scales,
    )
    return errors(as_numpy(out), attend(variant, batch))


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_decode_is_attention(case: tuple[DecodeVariant, str]) -> None:
    variant, items = case
    seed = CASES.index(case)
    batch = make_batch(variant, positions_for(variant, seed=seed), seed=seed)
    found = row_errors(variant, batch, plan_for(variant, batch.positions, items))
    assert max(found) <= LIMITS[variant.dtype], found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(24, 8, 128), (32, 8, 64), (16, 16, 80), (8, 1, 256)])
def test_long_rows_of_real_shapes_are_attention(
    heads: int, kv_heads: int, dim: int, bits: int | None, dtype: str
) -> None:
    variant = DecodeVariant(dim, dim, heads, kv_heads, dtype, 32, dim**-0.5, bits=bits)
    batch = make_batch(variant, list(LONG_ROWS), seed=dim)
    capacity = num_items(len(LONG_ROWS), kv_heads=kv_heads)
    plan = plan_items(np.array(LONG_ROWS, np.int32), capacity=capacity, page_size=variant.page_size)
    found = row_errors(variant, batch, plan)
    assert max(found) <= LIMITS[dtype], found


@pytest.mark.parametrize(("rope", "dim", "dtype", "norm_eps"), HEADS_CASES)
def test_heads_are_what_the_modules_make_of_them(rope: nn.Module, dim: int, dtype: str, norm_eps: float | None) -> None:
    found = check_against(rope, BACKEND, dim=dim, dtype=dtype, norm_eps=norm_eps)
    assert found.problem is None
    assert found.error <= HEADS_LIMITS[dtype]
