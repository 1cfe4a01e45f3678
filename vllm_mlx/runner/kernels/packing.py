"""How quantised keys and values lie in a pool: groups of a head's elements as small integers with a scale of their own.

Words are little-endian: the first element of a token is in the lowest bits of its first word. Scales are float16.

- 8 bits: x is scale * (u - 128) with u in 1..255.
- 4 bits: x is scale * u + bias with u in 0..15, as the values of a group need not lie around zero.
"""

from __future__ import annotations

from math import gcd

import mlx.core as mx
import msgspec

MAX_GROUP = 64
"""Elements that share a scale: more would cost quality, fewer would cost memory."""
UNIT = 8
"""Groups are whole multiples of this, so that a word of 4-bit elements has one scale."""
LARGEST_HALF = 65504.0


class Packing(msgspec.Struct, frozen=True):
    """One way to quantise tokens."""

    bits: int
    """8 or 4."""
    group: int
    """Elements that share a scale."""

    @property
    def scales_per_group(self) -> int:
        """2 where a group has a bias besides its scale."""
        return 1 if self.bits == 8 else 2

    def words(self, dim: int) -> int:
        """32-bit words of a token of `dim` elements."""
        return dim * self.bits // 32

    def scales(self, dim: int) -> int:
        """Scales and biases of a token of `dim` elements."""
        return dim // self.group * self.scales_per_group

    def token_bytes(self, dim: int) -> int:
        """Bytes of a token of `dim` elements, its scales included."""
        return 4 * self.words(dim) + 2 * self.scales(dim)

    def pack(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """Words uint32 [..., words] and scales float16 [..., scales] of tokens [..., dim]."""
        groups = tokens.astype(mx.float32).reshape(*tokens.shape[:-1], -1, self.group)
        elements, scales = _eight_bits(groups) if self.bits == 8 else _four_bits(groups)
        elements = elements.reshape(tokens.shape)
        if self.bits == 4:
            elements = elements[..., ::2] | elements[..., 1::2] << 4
        return elements.view(mx.uint32), scales.reshape(*tokens.shape[:-1], -1)

    def unpack(self, words: mx.array, scales: mx.array, dtype: mx.Dtype) -> mx.array:
        """Tokens [..., dim] again, as near as the bits allow."""
        elements = words.view(mx.uint8)
        if self.bits == 4:
            elements = mx.stack([elements & 15, elements >> 4], axis=-1).flatten(-2)
        groups = elements.reshape(*words.shape[:-1], -1, self.group).astype(mx.float32)
        scales = scales.reshape(*groups.shape[:-1], self.scales_per_group).astype(mx.float32)
        tokens = (groups - 128) * scales if self.bits == 8 else groups * scales[..., :1] + scales[..., 1:]
        return tokens.reshape(*words.shape[:-1], -1).astype(dtype)


def packing_of(bits: int, *, key_dim: int, value_dim: int) -> Packing:
    """The packing of heads of these sizes: the largest groups that divide both.

    Raises:
        ValueError: a head's elements do not divide into groups.
    """
    common = gcd(key_dim, value_dim)
    if common % UNIT:
        raise ValueError(f"heads of {key_dim} and {value_dim} elements do not divide into groups of {UNIT}")
    group = next(size for size in range(MAX_GROUP, 0, -UNIT) if common % size == 0)
    return Packing(bits, group)


def _eight_bits(groups: mx.array) -> tuple[mx.array, mx.array]:
    largest = mx.max(mx.abs(groups), axis=-1, keepdims=True)
    scale = mx.minimum(largest / 127, LARGEST_HALF).astype(mx.float16)
    steps = mx.round(groups * _inverse(scale))
    return (mx.clip(steps, -127, 127) + 128).astype(mx.uint8), scale


def _four_bits(groups: mx.array) -> tuple[mx.array, mx.array]:
    low, high = mx.min(groups, axis=-1, keepdims=True), mx.max(groups, axis=-1, keepdims=True)
    bias = mx.clip(low, -LARGEST_HALF, LARGEST_HALF).astype(mx.float16)
    scale = mx.minimum((high - low) / 15, LARGEST_HALF).astype(mx.float16)
    steps = mx.round((groups - bias.astype(mx.float32)) * _inverse(scale))
    return mx.clip(steps, 0, 15).astype(mx.uint8), mx.concatenate([scale, bias], axis=-1)


def _inverse(scale: mx.array) -> mx.array:
    """1 / scale; 0 for groups too small to have one."""
    wide = scale.astype(mx.float32)
    return mx.where(wide == 0, 0, 1 / wide)
