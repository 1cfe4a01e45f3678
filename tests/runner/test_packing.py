"""Quantised keys and values: how near they are, how small, and what they refuse."""

from __future__ import annotations

import mlx.core as mx
import pytest

from vllm_mlx.core.cachespec import LayerSpec, Layout
from vllm_mlx.runner.kernels.packing import Packing, packing_of
from vllm_mlx.runner.layers import PAGE_SIZE, LayerShape, ModelLayers

DIMS = (8, 16, 64, 80, 96, 128, 192, 256)


def packing(bits: int, dim: int) -> Packing:
    return packing_of(bits, key_dim=dim, value_dim=dim)


def steps_away(tokens: mx.array, one: Packing) -> mx.array:
    """How many steps of its group each element comes back away, at most half of one if all is well."""
    back = one.unpack(*one.pack(tokens), mx.float32)
    groups, near = (array.reshape(*tokens.shape[:-1], -1, one.group) for array in (tokens, back))
    low, high = mx.min(groups, axis=-1, keepdims=True), mx.max(groups, axis=-1, keepdims=True)
    step = mx.maximum(-low, high) / 127 if one.bits == 8 else (high - low) / 15
    return mx.abs(groups - near) / step


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("size", "offset"), [(1.0, 0.0), (30.0, 5.0), (1e-2, 0.0), (1e4, 0.0)])
def test_elements_come_back_within_half_a_step(bits: int, dim: int, size: float, offset: float) -> None:
    tokens = size * mx.random.normal((3, 50, dim), key=mx.random.key(dim)) + offset
    assert mx.max(steps_away(tokens, packing(bits, dim))).item() < 0.6  # scales are rounded too


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_constants_and_what_is_beyond_half_precision_stay_finite(bits: int) -> None:
    one = packing(bits, 64)
    for value, tolerance in ((0.0, 0.0), (3.5, 0.02), (-3.5, 0.02), (1e-9, 1e-9)):
        tokens = mx.full((2, 64), value)
        assert mx.max(mx.abs(one.unpack(*one.pack(tokens), mx.float32) - tokens)).item() <= tolerance
    huge = mx.array([[1e30, -1e30] * 32])
    assert mx.all(mx.isfinite(one.unpack(*one.pack(huge), mx.float32))).item()


@pytest.mark.parametrize("bits", [8, 4])
def test_an_element_depends_on_its_own_group_only(bits: int) -> None:
    one, tokens = packing(bits, 128), mx.random.normal((1, 128))
    changed = mx.concatenate([tokens[:, :64], 1000 * tokens[:, 64:]], axis=-1)
    before, after = (one.unpack(*one.pack(array), mx.float32) for array in (tokens, changed))
    assert mx.array_equal(before[:, :64], after[:, :64])
    assert not mx.array_equal(before[:, 64:], after[:, 64:])


@pytest.mark.parametrize(("bits", "least"), [(8, 1.9), (4, 3.5)])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_pages_hold_so_many_more_tokens_than_bfloat16(bits: int, least: float, dim: int) -> None:
    shape = LayerShape(LayerSpec(Layout.PAGES), 8, dim, dim, mx.bfloat16)
    layers = ModelLayers((shape, shape), (0, 0), 100)
    quantised = layers.quantised(bits)
    assert layers.cache_spec().page_bytes >= least * quantised.cache_spec().page_bytes
    words, scales = packing(bits, dim).pack(mx.zeros((8 * PAGE_SIZE, dim)))
    assert quantised.cache_spec().page_bytes == 2 * 2 * (words.nbytes + scales.nbytes)


def test_the_first_element_is_in_the_lowest_bits() -> None:
    words, scales = packing(4, 8).pack(mx.arange(8)[None] * 15 / 7)
    assert words.item() == 0xFDB96420
    assert scales.tolist() == [[1.0, 0.0]]
    words, scales = packing(8, 8).pack(mx.array([[127.0, -127, 0, 1, 2, 3, 4, 5]]))
    assert words.tolist() == [[0x818001FF, 0x85848382]]
    assert scales.tolist() == [[1.0]]


def test_groups_are_as_large_as_both_heads_allow() -> None:
    sizes = {(128, 128): 64, (192, 128): 64, (80, 80): 40, (96, 96): 48, (16, 16): 16, (48, 32): 16}
    assert {dims: packing_of(8, key_dim=dims[0], value_dim=dims[1]).group for dims in sizes} == sizes


@pytest.mark.parametrize("dim", [4, 36, 100])
def test_heads_that_do_not_divide_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"heads of {dim} and {dim} elements do not divide"):
        packing(8, dim)
