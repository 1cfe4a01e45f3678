"""Layers with different windows are split into groups that share memory but no pages."""

from __future__ import annotations

from itertools import cycle, islice

import pytest

from vllm_mlx.runner.page_groups import MAX_GROUPS, Grouping, group_layers


def grouped(pattern: list[int | None], num_layers: int, *, are_alike: bool = True) -> Grouping:
    """Layers whose windows repeat."""
    return group_layers(list(islice(cycle(pattern), num_layers)), are_alike=are_alike)


@pytest.mark.parametrize("windows", [[None], [4096], []])
def test_layers_with_one_window_are_one_group_with_a_pool_each(windows: list[int | None]) -> None:
    found = grouped(windows, 32 * len(windows))
    assert found.windows == (tuple(windows) or (None,))
    assert found.places == tuple((0, i) for i in range(32 * len(windows)))
    assert not found.is_split


@pytest.mark.parametrize(
    ("pattern", "num_layers", "num_pools", "num_local"),
    [
        ([512] * 5 + [None], 26, 4, 6),
        ([1024] * 5 + [None], 48, 8, 5),
        ([1024] * 5 + [None], 62, 10, 6),
        ([128, None], 24, 12, 1),
        ([4096] * 3 + [None], 32, 8, 3),
    ],
)
def test_groups_are_of_the_size_of_the_rarer_kind(
    pattern: list[int | None], num_layers: int, num_pools: int, num_local: int
) -> None:
    found = grouped(pattern, num_layers)
    assert found.num_pools == num_pools
    assert found.windows == (None, *[pattern[0]] * num_local)
    assert len(set(found.places)) == num_layers
    for window, (group, pool) in zip(cycle(pattern), found.places, strict=False):
        assert found.windows[group] == window
        assert pool < num_pools


def test_a_single_layer_with_a_window_is_not_worth_a_group() -> None:
    assert group_layers([128, *[None] * 31], are_alike=True).windows == (None,)


def test_groups_are_few() -> None:
    for num_layers in range(2, 70):
        for pattern in ([16] * 5 + [None], [16, None, None], [16, 4096, None]):
            assert len(grouped(pattern, num_layers).windows) <= MAX_GROUPS


def test_layers_that_differ_in_shape_share_no_memory() -> None:
    found = grouped([128, None], 4, are_alike=False)
    assert (found.windows, found.num_pools) == ((None,), 4)
    assert grouped([128, 256], 4, are_alike=False).windows == (256,)
