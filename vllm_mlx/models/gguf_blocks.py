"""GGUF's blocks as MLX arrays: quantised blocks become MLX's affine groups of 32, without loss.

A GGUF block of 32 holds w = d * q + m (Q4_1), d * (q - 8) (Q4_0) or d * q with q signed (Q8_0); MLX's affine mode
holds w = scale * q + bias with q unsigned and packed into uint32, least significant bits first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_mlx.models.gguf_file import BLOCKS

if TYPE_CHECKING:
    import numpy as np

GROUP_SIZE = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Types that MLX can compute with as they are."""
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q6_K": "float16"}
"""Types that become ordinary arrays, and of which type. Q6_K has groups of 16, which MLX's affine mode lacks."""


class Affine:
    """One quantised matrix in MLX's affine layout; made from raw rows `[rows, bytes per row]`."""

    def __init__(self, raw: np.ndarray, type_name: str) -> None:
        values, width = BLOCKS[type_name]
        self._blocks = raw.reshape(raw.shape[0], -1, width)
        self._type = type_name
        self._values = values

    def weight(self) -> np.ndarray:
        """Packed values, uint32 `[rows, columns * bits / 32]`."""
        import numpy as np

        if self._type == "Q8_0":
            packed = self._blocks[..., 2:] ^ np.uint8(0x80)
        else:
            data = self._blocks[..., -self._values // 2 :]
            low, high = data & 0xF, data >> 4  # the first and the second half of the block
            values = np.concatenate([low, high], axis=-1)
            packed = values[..., 0::2] | (values[..., 1::2] << 4)
        return np.ascontiguousarray(packed).reshape(packed.shape[0], -1).view("<u4")

    def scales(self) -> np.ndarray:
        """Scale per group, float16 `[rows, columns / 32]`."""
        return self._half(0)

    def biases(self) -> np.ndarray:
        """Bias per group, float16 `[rows, columns / 32]`. Exact: a power of two times the scale, or as stored."""
        import numpy as np

        if self._type == "Q4_1":
            return self._half(2)
        with np.errstate(over="ignore"):  # the caller looks for infinities
            return self.scales() * np.float16(-8 if self._type == "Q4_0" else -128)

    def _half(self, at: int) -> np.ndarray:
        import numpy as np

        return np.ascontiguousarray(self._blocks[..., at : at + 2]).view("<f2")[..., 0]


def plain(raw: np.ndarray, type_name: str) -> np.ndarray:
    """Raw rows of a type in PLAIN as values `[rows, columns]`; bfloat16 as uint16 with the same bits."""
    import numpy as np

    if type_name == "Q6_K":
        return _dequantize_q6_k(raw).astype(np.float16)
    return np.ascontiguousarray(raw).view({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[type_name])


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray | None:
    """float32 `values` as float16 or bfloat16 (uint16 bits), or None if that would change one of them."""
    import numpy as np

    if dtype == "bfloat16":
        bits = values.view("<u4")
        return None if (bits & 0xFFFF).any() else (bits >> 16).astype("<u2")
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    return half if np.array_equal(half.astype("<f4"), values) else None


def _dequantize_q6_k(raw: np.ndarray) -> np.ndarray:
    """Blocks of 256: 4 low bits of each value, 2 high bits, a signed scale per 16 values, one float16 factor."""
    import numpy as np

    blocks = raw.reshape(-1, 210)
    halves = len(blocks) * 2
    low = blocks[:, :128].reshape(halves, 1, 64) >> np.array([[0], [4]], np.uint8) & 0xF
    high = blocks[:, 128:192].reshape(halves, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    values = (low.reshape(halves, 128) | high.reshape(halves, 128) << 4).astype(np.float32) - 32
    factors = np.ascontiguousarray(blocks[:, 208:]).view("<f2").astype(np.float32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8) * factors
    return (values.reshape(len(blocks), 16, 16) * scales[..., None]).reshape(raw.shape[0], -1)


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection in Hugging Face's order.

    Llama GGUFs interleave the two halves of every head, for rotary embeddings on neighbouring pairs.
    """
    import numpy as np

    half = rows.shape[0] // num_heads // 2
    halves = rows.reshape(num_heads, half, 2, -1).swapaxes(1, 2)
    return np.ascontiguousarray(halves).reshape(rows.shape)
