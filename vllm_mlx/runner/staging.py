"""How numbers go to a device whose host must not take memory while it computes.

MLX takes memory for every array that the host makes. On CUDA that may be memory that the device has used, or new memory
that both can read: for either the host waits until the device has nothing to do. A step that is built while the one
before it runs would be built too late. So memory is taken once, written through a view of NumPy's, and used again when
the device has surely read it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from vllm_mlx.runner.kernels.plan import Integers

Send = Callable[[Integers], mx.array]
"""Makes an array on the device; `mx.array` does."""

MIN_SIZE = 256
"""Numbers. Sizes are powers of two, so that few different ones are kept."""


class _Piece(NamedTuple):
    array: mx.array
    view: Integers


class Staging:
    """Memory that is used again and again. Steps are begun one after the other, and done in that order.

    What is sent belongs to the step begun last: its arrays must be evaluated with that step, or never, and what is to
    last longer must be copied on the device.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[_Piece]] = defaultdict(list)
        self._begun: deque[list[_Piece]] = deque()
        self._done: list[_Piece] = []
        """Of the step that is done last: it gave its numbers, but may not have read all of its own yet."""

    def begin(self) -> None:
        """What is sent from now on is another step's."""
        self._begun.append([])

    def done(self) -> None:
        """The numbers of the oldest step are there, and so all that steps before it computed."""
        for piece in self._done:
            self._free[piece.view.size].append(piece)
        self._done = self._begun.popleft()

    def send(self, numbers: Integers) -> mx.array:
        """These numbers on the device, int32 [of the same shape]."""
        assert numbers.dtype == np.int32, numbers.dtype
        size = max(MIN_SIZE, 1 << (numbers.size - 1).bit_length())
        piece = self._free[size].pop() if self._free[size] else _new(size)
        piece.view[: numbers.size] = numbers.reshape(-1)
        (self._begun[-1] if self._begun else self._done).append(piece)
        return piece.array[: numbers.size].reshape(numbers.shape)


def _new(size: int) -> _Piece:
    array = mx.array(np.zeros(size, np.int32))
    return _Piece(array, np.array(array, copy=False))
