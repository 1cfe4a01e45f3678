"""Work items cover every row's tokens exactly once, whatever the lengths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mlx.runner.kernels.plan import PADDED, num_items, plan_items
from vllm_mlx.runner.kernels.variant import DecodeVariant, geometry

lengths = st.one_of(st.just(PADDED), st.integers(0, 300), st.integers(0, 200_000))


@given(
    positions=st.lists(lengths, min_size=1, max_size=70),
    page_size=st.sampled_from([16, 32, 64]),
    kv_heads=st.sampled_from([1, 2, 8, 32]),
    num_queries=st.sampled_from([1, 3, 8]),
    window=st.sampled_from([None, 1, 7, 128, 5000]),
)
def test_items_cover_each_row_s_tokens_in_order(
    positions: list[int], page_size: int, kv_heads: int, num_queries: int, window: int | None
) -> None:
    capacity = num_items(len(positions), kv_heads=kv_heads)
    host = np.asarray(positions, np.int32)
    plan = plan_items(host, capacity=capacity, page_size=page_size, num_queries=num_queries, window=window)
    assert plan.items.shape == (capacity, 4)
    assert plan.starts[0] == 0
    assert plan.starts[-1] <= capacity
    assert (plan.items[plan.starts[-1] :, 0] == -1).all()
    for row, position in enumerate(positions):
        own = plan.items[plan.starts[row] : plan.starts[row + 1]]
        if position == PADDED:
            assert len(own) == 0
            continue
        assert (own[:, 0] == row).all()
        assert (own[:, 3] == position).all()
        assert own[-1, 2] == position + num_queries
        assert (own[1:, 1] == own[:-1, 2]).all()
        assert (own[:, 2] > own[:, 1]).all()
        assert (own[:, 1] % page_size == 0).all()
        first_seen = 0 if window is None else max(0, position + 1 - window)
        assert own[0, 1] <= first_seen < own[0, 1] + page_size


def test_the_shape_of_a_plan_depends_on_the_number_of_rows_alone() -> None:
    shapes = {
        plan_items(np.full(8, position, np.int32), capacity=num_items(8, kv_heads=4), page_size=32).items.shape
        for position in (0, 100, 100_000)
    }
    assert len(shapes) == 1


def test_a_long_row_beside_short_ones_is_cut_into_many_items() -> None:
    positions = np.asarray([16_383, *[255] * 31], np.int32)
    plan = plan_items(positions, capacity=num_items(32, kv_heads=8), page_size=32)
    assert plan.starts[1] >= 8
    assert (np.diff(plan.starts)[1:] == 1).all()


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_supported_variant_has_a_layout(dims: tuple[int, int], dtype: str) -> None:
    for group, num_queries, page_size in itertools.product(range(1, 17), (1, 4, 8), (16, 32, 64)):
        variant = DecodeVariant(*dims, 2 * group, 2, dtype, page_size, 1.0, num_queries=num_queries)
        layout = geometry(variant)
        assert layout.vectors * layout.query_blocks >= group * num_queries
        assert layout.vectors * (layout.query_blocks - 1) < group * num_queries
        assert page_size % layout.stride == 0
        assert layout.lanes * layout.slots == 32


@pytest.mark.parametrize("problem", [{"dtype": "int8"}, {"heads": 7}, {"key_dim": 65}, {"value_dim": 4096}])
def test_a_variant_without_a_layout_says_why(problem: dict) -> None:
    fields = {"key_dim": 64, "value_dim": 64, "heads": 8, "kv_heads": 2, "dtype": "float16", "page_size": 32}
    with pytest.raises(ValueError, match=r"no decode kernel|do not divide"):
        geometry(DecodeVariant(**{**fields, "scale": 1.0, **problem}))
