"""`mx.fast.metal_kernel` for machines without Metal: product code that launches kernels runs unchanged, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from runner.metal.emulator import Array, Emulator, as_numpy, trace

make_kernel = mx.fast.metal_kernel  # MLX's own, whatever stands in for it later


class MetalStandIn:
    """To be put in the place of `mx.fast.metal_kernel`. Its kernels run when they are called, not lazily.

    `in_place` names inputs that kernels may change, `raced` those of them where threads may write to one place.
    """

    def __init__(self, emulator: Emulator, *, in_place: Collection[str] = (), raced: Collection[str] = ()) -> None:
        self._emulator = emulator
        self._in_place = in_place
        self._raced = raced
        self.num_launches = 0

    def __call__(self, **kernel: Any) -> Callable[..., list[mx.array]]:
        made, names = make_kernel(**kernel), kernel["input_names"]

        def launch(*, inputs: Sequence[mx.array], **how: Any) -> list[mx.array]:
            return self._run(lambda *arrays: made(inputs=list(arrays), **how), names, inputs, how["output_dtypes"])

        return launch

    def _run(
        self, function: Callable[..., Any], names: Sequence[str], inputs: Sequence[mx.array], dtypes: Sequence[mx.Dtype]
    ) -> list[mx.array]:
        self.num_launches += 1
        mx.eval(list(inputs))
        traced = trace(function, *inputs)
        known = self._emulator.execute(traced, inputs, in_place=self._in_place, raced=self._raced)
        for name, argument, array in zip(names, traced.arguments, inputs, strict=True):
            if name in self._in_place:
                _overwrite(array, known[argument])
        return [_as_mlx(known[result], dtype) for result, dtype in zip(traced.results, dtypes, strict=True)]


def _overwrite(array: mx.array, new: Array) -> None:
    """Change the memory of an array, as a kernel does behind MLX's back."""
    same_memory = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(same_memory)
    np.array(same_memory, copy=False)[...] = new
    assert np.array_equal(as_numpy(array), new, equal_nan=new.dtype.kind == "f"), "MLX moved the array"


def _as_mlx(array: Array, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(dtype) if dtype == mx.bfloat16 else mx.array(array)
