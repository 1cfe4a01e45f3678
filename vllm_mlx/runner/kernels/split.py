"""A kernel that takes the rows of one array apart.

What is merged in one product comes out side by side, and MLX's own operations copy each part before they work on it;
this makes the parts whole in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from vllm_mlx.core.errors import one_line
from vllm_mlx.core.log import get_logger
from vllm_mlx.runner.kernels.dialect import CHUNK, build, header, opening

log = get_logger("runner")

THREADS = 256

# joined [batch, tokens, sum of the widths], part_i [batch, tokens, width_i], in chunks.
BODY = r"""
  const int index = block_x * THREADS + thread_index, chunk = index % CHUNKS;
  const size_t row = index / CHUNKS;
  if (row < size_t(joined_shape[0]) * joined_shape[1]) {
    const Chunk value = ((const DEVICE Chunk*)joined)[index];
    PARTS
  }
"""
PART = "if (chunk >= {begin} && chunk < {end}) ((DEVICE Chunk*)part_{i})[row * {width} + (chunk - {begin})] = value;"


class SplitKernel:
    """Splits rows of elements of `dtype` into parts of the given widths.

    Raises:
        ValueError: a part is not made of whole words.
    """

    def __init__(self, widths: Sequence[int], dtype: mx.Dtype, backend: str) -> None:
        self._widths, self.dtype = tuple(widths), dtype
        per_word = 4 // dtype.size
        words = next((n for n in (4, 2, 1) if all(width % (n * per_word) == 0 for width in widths)), None)
        if words is None:
            raise ValueError(f"parts of {list(widths)} elements of {dtype} are not made of whole words")
        self._chunks = [width // (words * per_word) for width in widths]
        ends = [sum(self._chunks[: i + 1]) for i in range(len(widths))]
        parts = [
            PART.format(i=i, begin=end - width, end=end, width=width)
            for i, (width, end) in enumerate(zip(self._chunks, ends, strict=True))
        ]
        constants: dict[str, int | str] = {
            "CHUNK_WORDS": words,
            "CHUNKS": ends[-1],
            "THREADS": THREADS,
            "PARTS": " ".join(parts),
        }
        text = (header(str(dtype).rpartition(".")[2], backend, constants, CHUNK), opening(backend) + BODY)
        outputs = tuple(f"part_{i}" for i in range(len(widths)))
        self._kernel = build("split_rows", text, inputs=("joined",), outputs=outputs, backend=backend)

    def __call__(self, joined: mx.array) -> list[mx.array]:
        """Parts [batch, tokens, width] of [batch, tokens, sum of the widths], each contiguous."""
        batch, tokens, _ = joined.shape
        num_threads = batch * tokens * sum(self._chunks)
        parts: list[mx.array] = self._kernel(
            inputs=[joined],
            output_shapes=[(batch, tokens, width) for width in self._widths],
            output_dtypes=[self.dtype] * len(self._widths),
            grid=(-(-num_threads // THREADS) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
        )
        return parts


def checked_split(widths: Sequence[int], dtype: mx.Dtype, backend: str) -> SplitKernel | None:
    """The kernel, tried on this device; None, with a warning, if it does not do what it should."""
    joined = mx.random.normal((3, 2, sum(widths))).astype(dtype)
    bounds = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    try:
        kernel = SplitKernel(widths, dtype, backend)
        pairs = zip(kernel(joined), mx.split(joined, bounds, axis=-1), strict=True)
        if all(mx.array_equal(part, expected).item() for part, expected in pairs):
            return kernel
        problem = "its parts differ from those of plain operations"
    except (RuntimeError, ValueError) as error:
        problem = one_line(error)
    log.warning("merged projections are split by plain operations: the kernel for it is not used: %s", problem)
    return None
