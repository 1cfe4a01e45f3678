"""Metal kernels on any machine: what `mx.fast.metal_kernel` would hand to Metal, compiled as C++ and executed.

MLX itself writes the kernel's text and says how it is launched: a function that is being exported may use
`mx.fast.metal_kernel` without a GPU, and the export tells source, grid, threadgroup and arrays of each call.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from runner.metal.toolchain import Toolchain

Array = NDArray[Any]
Dims = tuple[int, int, int]
RUN_TIMEOUT_S = 120
NUMPY_TYPES = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.int8: np.int8,
    mx.uint8: np.uint8,
    mx.int16: np.int16,
    mx.uint16: np.uint16,
    mx.int32: np.int32,
    mx.uint32: np.uint32,
    mx.int64: np.int64,
    mx.uint64: np.uint64,
    mx.bool_: np.bool_,
}
MAX_BUFFERS = 31  # of a kernel in Metal


class EmulationError(Exception):
    """The kernel did what Metal does not allow; the message tells what, where and on which thread."""


@dataclass(frozen=True)
class Launch:
    """One kernel call as MLX would make it."""

    name: str
    text: str
    grid: Dims
    """Threads, not threadgroups."""
    threadgroup: Dims
    inputs: tuple[str, ...]
    """Names that MLX gave to the arrays of the traced function."""
    outputs: tuple[tuple[str, tuple[int, ...], mx.Dtype], ...]
    shape_infos: tuple[tuple[bool, bool, bool], ...]
    """For each input, whether its shape, strides and number of dimensions are arguments too."""


@dataclass(frozen=True)
class Trace:
    """The kernel calls of a function, in order."""

    arguments: tuple[str, ...]
    results: tuple[str, ...]
    constants: dict[str, mx.array]
    launches: tuple[Launch, ...]


def trace(function: Callable[..., Any], *arrays: mx.array) -> Trace:
    """What `function` calls on arrays of these shapes; it must consist of Metal kernels alone."""
    records: list[dict[str, Any]] = []
    mx.export_function(records.append, function, *arrays)
    by_type = {record["type"]: record for record in records}
    primitives = [record for record in records if record["type"] == "primitive"]
    others = {record["name"] for record in primitives} - {"CustomKernel"}
    if others:
        raise ValueError(f"the traced function does more than call kernels: {sorted(others)}")
    return Trace(
        arguments=tuple(name for name, _, _ in by_type["inputs"]["inputs"]),
        results=tuple(name for name, _, _ in by_type["outputs"]["outputs"]),
        constants=dict(by_type["constants"]["constants"]),
        launches=tuple(_launch(record) for record in primitives),
    )


def _launch(record: dict[str, Any]) -> Launch:
    name, text, *numbers = record["arguments"]
    grid, threadgroup, shape_infos = numbers[0:3], numbers[3:6], numbers[6]
    return Launch(
        name=name,
        text=text,
        grid=(int(grid[0]), int(grid[1]), int(grid[2])),
        threadgroup=(int(threadgroup[0]), int(threadgroup[1]), int(threadgroup[2])),
        inputs=tuple(name for name, _, _ in record["inputs"]),
        outputs=tuple((name, tuple(shape), dtype) for name, shape, dtype in record["outputs"]),
        shape_infos=tuple(shape_infos),
    )


class Emulator:
    """Runs Metal kernels. Each runs twice, in opposite orders of threads, SIMD groups and threadgroups, and must give
    the same bits; thread and threadgroup memory start as garbage, outputs as NaN."""

    def __init__(self, toolchain: Toolchain) -> None:
        self.toolchain = toolchain

    def prepare(self, traces: Sequence[Trace]) -> None:
        """Compile the kernels of several functions side by side."""
        self.toolchain.build_all([launch.text for each in traces for launch in each.launches])

    def call(self, function: Callable[..., Any], *arrays: mx.array) -> list[Array]:
        """The results of a function of Metal kernels. bfloat16 comes back as uint16.

        Raises:
            NotMetalError, CompileError: a kernel's text is no Metal.
            EmulationError: a kernel misbehaves.
        """
        traced = trace(function, *arrays)
        known = {name: _as_numpy(array) for name, array in traced.constants.items()}
        known |= dict(zip(traced.arguments, map(_as_numpy, arrays), strict=True))
        for launch in traced.launches:
            known |= self.launch(launch, [known[name] for name in launch.inputs])
        return [known[name] for name in traced.results]

    def launch(self, launch: Launch, inputs: Sequence[Array]) -> dict[str, Array]:
        program = self.toolchain.build(launch.text)
        pairs = zip(inputs, launch.shape_infos, strict=True)
        buffers = [each for array, info in pairs for each in _arguments(array, info)]
        names = _buffer_names(launch.text)
        if len(names) > MAX_BUFFERS:
            raise EmulationError(f"{len(names)} buffers; a kernel in Metal has at most {MAX_BUFFERS}")
        orders = [_order(launch, names, buffers, reverse=reverse) for reverse in (False, True)]
        with ThreadPoolExecutor(len(orders)) as pool:
            forth, back = pool.map(lambda order: _run(program, launch, order), orders)
        for name, (own, _, _) in zip(names[len(buffers) :], launch.outputs, strict=True):
            _compare(name, forth[own], back[own])
        return forth


def run_metal(
    emulator: Emulator,
    name: str,
    header: str,
    source: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    grid: Dims,
    threadgroup: Dims,
    template: list[tuple[str, Any]] | None = None,
) -> dict[str, Array]:
    """One call of `mx.fast.metal_kernel(name, ...)`: same arguments, same meaning."""
    kernel = mx.fast.metal_kernel(
        name=name, input_names=list(inputs), output_names=list(outputs), source=source, header=header
    )

    def call(*arrays: mx.array) -> Any:
        return kernel(
            inputs=list(arrays),
            output_shapes=[shape for shape, _ in outputs.values()],
            output_dtypes=[dtype for _, dtype in outputs.values()],
            grid=grid,
            threadgroup=threadgroup,
            template=template,
        )

    return dict(zip(outputs, emulator.call(call, *inputs.values()), strict=True))


def _as_numpy(array: mx.array) -> Array:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _arguments(array: Array, info: tuple[bool, bool, bool]) -> list[Array]:
    """An input and what MLX passes after it."""
    arguments = [np.ascontiguousarray(array)]
    if not array.ndim:
        return arguments
    has_shape, has_strides, has_ndim = info
    strides = [stride // array.itemsize for stride in arguments[0].strides]
    extra = [
        (has_shape, np.array(array.shape, np.int32)),
        (has_strides, np.array(strides, np.int64)),
        (has_ndim, np.array(array.ndim, np.int32)),
    ]
    return arguments + [each for is_wanted, each in extra if is_wanted]


def _buffer_names(text: str) -> list[str]:
    """Parameters that are buffers, from the signature that MLX wrote."""
    signature = text[text.index("[[kernel]] void") :]
    found = []
    while f" [[buffer({len(found)})]]" in signature:
        before = signature.split(f" [[buffer({len(found)})]]", 1)[0]
        found.append(before.split()[-1])
    return found


def _order(launch: Launch, names: list[str], buffers: list[Array], *, reverse: bool) -> bytes:
    lines = [f"{name} {x} {y} {z}" for name, (x, y, z) in (("grid", launch.grid), ("threadgroup", launch.threadgroup))]
    lines += ["seed 1", f"reverse {int(reverse)}"]
    lines += [f"input {name} {buffer.nbytes}" for name, buffer in zip(names, buffers, strict=False)]
    sizes = [_size_bytes(shape, dtype) for _, shape, dtype in launch.outputs]
    lines += [f"output {name} {size}" for name, size in zip(names[len(buffers) :], sizes, strict=True)]
    return "\n".join([*lines, "run\n"]).encode() + b"".join(buffer.tobytes() for buffer in buffers)


def _run(program: Path, launch: Launch, order: bytes) -> dict[str, Array]:
    try:
        done = subprocess.run([program], input=order, capture_output=True, check=False, timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise EmulationError(f"the kernel does not end within {RUN_TIMEOUT_S} s") from None
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise EmulationError(message or f"the kernel's process ended with {done.returncode}")
    outputs, start = {}, 0
    for name, shape, dtype in launch.outputs:
        end = start + _size_bytes(shape, dtype)
        outputs[name] = np.frombuffer(done.stdout[start:end], NUMPY_TYPES[dtype]).reshape(shape)
        start = end
    return outputs


def _size_bytes(shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.size


def _compare(name: str, forth: Array, back: Array) -> None:
    """Raise where two orders of execution gave different bits."""
    pairs = [np.frombuffer(array.tobytes(), np.uint8).reshape(-1, array.itemsize) for array in (forth, back)]
    different = np.any(pairs[0] != pairs[1], axis=1)
    if different.any():
        places = np.flatnonzero(different)
        first = tuple(int(i) for i in np.unravel_index(places[0], forth.shape))
        raise EmulationError(
            f"output '{name}' depends on the order of threads or on memory nobody wrote: {len(places)} of {forth.size} "
            f"elements differ, the first at {first}: {forth[first]} or {back[first]}"
        )
