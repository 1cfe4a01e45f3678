"""Metal kernels on any machine: what `mx.fast.metal_kernel` would hand to Metal, compiled as C++ and executed.

MLX itself writes the kernel's text and says how it is launched: a function that is being exported may use
`mx.fast.metal_kernel` without a GPU, and the export tells source, grid, threadgroup and arrays of each call.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Collection, Sequence
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


class EmulationError(RuntimeError):
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

    def call(self, function: Callable[..., Any], *arrays: mx.array, in_place: Collection[str] = ()) -> list[Array]:
        """The results of a function of Metal kernels, then its arguments as they are afterwards. bfloat16 comes back as
        uint16. Kernels may write to inputs that they call by a name of `in_place`.

        Raises:
            NotMetalError, CompileError: a kernel's text is no Metal.
            EmulationError: a kernel misbehaves.
        """
        traced = trace(function, *arrays)
        known = self.execute(traced, arrays, in_place=in_place)
        return [known[name] for name in (*traced.results, *traced.arguments)]

    def execute(
        self, traced: Trace, arrays: Sequence[mx.array], *, in_place: Collection[str] = (), raced: Collection[str] = ()
    ) -> dict[str, Array]:
        """Every array of a trace after its kernels ran. Buffers of `raced` may depend on the order of threads."""
        known = {name: as_numpy(array) for name, array in traced.constants.items()}
        known |= dict(zip(traced.arguments, map(as_numpy, arrays), strict=True))
        for launch in traced.launches:
            buffers = _buffers(launch, [known[name] for name in launch.inputs], in_place)
            known |= self._launch(launch, buffers, raced)
        return known

    def _launch(self, launch: Launch, buffers: list[_Buffer], raced: Collection[str]) -> dict[str, Array]:
        program = self.toolchain.build(launch.text)
        orders = [_order(launch, buffers, reverse=reverse) for reverse in (False, True)]
        with ThreadPoolExecutor(len(orders)) as pool:
            forth, back = pool.map(lambda order: _run(program, order), orders)
        changed, start = {}, 0
        for buffer in buffers:
            if buffer.kind == "input":
                continue
            end = start + buffer.data.nbytes
            if buffer.name not in raced:
                _compare(buffer, forth[start:end], back[start:end])
            changed[buffer.array] = np.frombuffer(forth[start:end], buffer.data.dtype).reshape(buffer.data.shape)
            start = end
        return changed


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

    return dict(zip(outputs, emulator.call(call, *inputs.values()), strict=False))


def as_numpy(array: mx.array) -> Array:
    """The same bits; bfloat16 as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


@dataclass(frozen=True)
class _Buffer:
    """An argument of a kernel."""

    kind: str
    """'input', 'output' or 'in_place'."""
    name: str
    """In the kernel's text."""
    array: str
    """In the trace."""
    data: Array
    """What is in it at the start; of an output only shape and type count."""


def _buffers(launch: Launch, inputs: Sequence[Array], in_place: Collection[str]) -> list[_Buffer]:
    """Arguments in MLX's order; their names are read from the signature that MLX wrote."""
    signature = launch.text[launch.text.index("[[kernel]] void") :]
    names = re.findall(r"(\w+) \[\[buffer\(\d+\)\]\]", signature)
    if len(names) > MAX_BUFFERS:
        raise EmulationError(f"{len(names)} buffers; a kernel in Metal has at most {MAX_BUFFERS}")
    following = iter(names)
    buffers = []
    for array, data, info in zip(launch.inputs, inputs, launch.shape_infos, strict=True):
        name = next(following)
        kind = "in_place" if name in in_place else "input"
        buffers.append(_Buffer(kind, name, array, np.ascontiguousarray(data)))
        buffers += [_Buffer("input", next(following), "", extra) for extra in _described(data, info)]
    for array, shape, dtype in launch.outputs:
        buffers.append(_Buffer("output", next(following), array, np.empty(shape, NUMPY_TYPES[dtype])))
    return buffers


def _described(data: Array, info: tuple[bool, bool, bool]) -> list[Array]:
    """Shape, strides and number of dimensions, those that the kernel names."""
    if not data.ndim:
        return []
    strides = [stride // data.itemsize for stride in np.empty_like(data, order="C").strides]
    values = (np.array(data.shape, np.int32), np.array(strides, np.int64), np.array(data.ndim, np.int32))
    return [value for is_wanted, value in zip(info, values, strict=True) if is_wanted]


def _order(launch: Launch, buffers: list[_Buffer], *, reverse: bool) -> bytes:
    """What the emulator's program reads: see host/emulator.cpp."""
    sizes = (("grid", launch.grid), ("threadgroup", launch.threadgroup))
    lines = [f"{name} {x} {y} {z}" for name, (x, y, z) in sizes]
    lines += ["seed 1", f"reverse {int(reverse)}"]
    lines += [f"{buffer.kind} {buffer.name} {buffer.data.nbytes}" for buffer in buffers]
    data = b"".join(buffer.data.tobytes() for buffer in buffers if buffer.kind != "output")
    return "\n".join([*lines, "run\n"]).encode() + data


def _run(program: Path, order: bytes) -> bytes:
    try:
        done = subprocess.run([program], input=order, capture_output=True, check=False, timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise EmulationError(f"the kernel does not end within {RUN_TIMEOUT_S} s") from None
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise EmulationError(message or f"the kernel's process ended with {done.returncode}")
    return done.stdout


def _compare(buffer: _Buffer, forth: bytes, back: bytes) -> None:
    """Raise where two orders of execution gave different bits."""
    if forth == back:
        return
    item, shape = buffer.data.itemsize, buffer.data.shape
    pairs = [np.frombuffer(data, np.uint8).reshape(-1, item) for data in (forth, back)]
    places = np.flatnonzero(np.any(pairs[0] != pairs[1], axis=1))
    first = tuple(int(i) for i in np.unravel_index(places[0], shape))
    values = [np.frombuffer(data, buffer.data.dtype)[places[0]] for data in (forth, back)]
    raise EmulationError(
        f"'{buffer.name}' depends on the order of threads or on memory nobody wrote: {len(places)} of "
        f"{buffer.data.size} elements differ, the first at {first}: {values[0]} or {values[1]}"
    )
