"""Masks of a chunk, in each of their forms, hide the same."""

from __future__ import annotations

import mlx.core as mx
import pytest

from vllm_mlx.runner.geometry import SinglePlace


@pytest.mark.parametrize("window", [3, 6])
@pytest.mark.parametrize("begin", [0, 4])
def test_what_is_added_hides_what_the_booleans_hide(window: int, begin: int) -> None:
    place = SinglePlace(7, 5, ())
    seen = place.mask(window, begin=begin, as_array=True)
    added = place.added_mask(window, begin=begin, dtype=mx.float32)
    assert isinstance(seen, mx.array)
    assert isinstance(added, mx.array)
    keys, values = (mx.random.normal((1, 2, 12 - begin, 16), key=mx.random.key(i)) for i in range(2))
    queries = mx.random.normal((1, 2, 5, 16), key=mx.random.key(2))
    by_booleans, by_sums = (
        mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.25, mask=mask) for mask in (seen, added)
    )
    assert mx.allclose(by_booleans, by_sums, atol=1e-6)
    assert added is place.added_mask(window, begin=begin, dtype=mx.float32), "each layer would make it anew"


def test_masks_have_names_where_no_window_hides_anything() -> None:
    assert SinglePlace(7, 5, ()).mask(None, begin=0, as_array=False) == "causal"
    assert SinglePlace(7, 5, ()).mask(100, begin=0, as_array=False) == "causal"
    for window in (None, 100):
        assert SinglePlace(7, 5, ()).added_mask(window, begin=0, dtype=mx.float32) == "causal"
    assert SinglePlace(7, 1, ()).added_mask(None, begin=0, dtype=mx.float32) is None
    assert isinstance(SinglePlace(7, 5, ()).mask(3, begin=0, as_array=False), mx.array)
