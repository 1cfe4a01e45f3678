"""The emulator of Metal's execution: what it computes, and what it catches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from runner.metal import emulator as emulation
from runner.metal.covering import all_pairs
from runner.metal.emulator import EmulationError, Emulator, as_numpy, run_metal, trace
from runner.metal.support import KEEP_DAYS, emulator_for_tests, remove_old
from runner.metal.tokens import NotMetalError
from runner.metal.toolchain import CompileError

Array = Any
FLOATS = ((32,), mx.float32)
SETUP = """
  const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const uint index = thread_position_in_grid.x;
"""


@pytest.fixture(scope="session")
def emulator(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return emulator_for_tests(pytestconfig, tmp_path_factory)


@pytest.fixture
def run(emulator: Emulator) -> Callable[..., Array]:
    """Run a body over `x`, float32 or what is given, with one output `y`; 32 threads unless told otherwise."""

    def run_body(
        body: str,
        x: mx.array | None = None,
        *,
        y: tuple[tuple[int, ...], mx.Dtype] = FLOATS,
        grid: tuple[int, int, int] = (32, 1, 1),
        threadgroup: tuple[int, int, int] = (32, 1, 1),
        header: str = "",
        template: list[tuple[str, Any]] | None = None,
    ) -> Array:
        inputs = {"x": mx.arange(32).astype(mx.float32) if x is None else x}
        return run_metal(emulator, "test", header, SETUP + body, inputs, {"y": y}, grid, threadgroup, template)["y"]

    return run_body


# ---- where threads are ----


def test_grid_counts_threads_and_the_last_threadgroup_may_be_smaller(run: Callable[..., Array]) -> None:
    body = """
      y[4 * index] = thread_position_in_threadgroup.x + 100 * threadgroup_position_in_grid.x;
      y[4 * index + 1] = threads_per_threadgroup.x + 100 * dispatch_threads_per_threadgroup.x;
      y[4 * index + 2] = threadgroups_per_grid.x + 100 * simdgroups_per_threadgroup;
      y[4 * index + 3] = lane + 100 * simdgroup;
    """
    y = run(body, y=((70, 4), mx.int32), grid=(70, 1, 1), threadgroup=(48, 1, 1))
    i = np.arange(70)
    assert np.array_equal(y[:, 0], i % 48 + 100 * (i // 48))
    assert np.array_equal(y[:, 1], np.where(i < 48, 48, 22) + 4800)
    assert np.array_equal(y[:, 2], np.where(i < 48, 2, 1) * 100 + 2)
    assert np.array_equal(y[:, 3], i % 48 % 32 + 100 * (i % 48 // 32))


def test_positions_have_three_dimensions(run: Callable[..., Array]) -> None:
    body = """
      const uint3 p = thread_position_in_grid, n = threads_per_grid;
      y[(p.z * n.y + p.y) * n.x + p.x] = p.x + 10 * p.y + 100 * p.z + 1000 * threadgroup_position_in_grid.y;
    """
    y = run(body, y=((3, 4, 5), mx.int32), grid=(5, 4, 3), threadgroup=(5, 2, 1))
    z, r, c = np.indices((3, 4, 5))
    assert np.array_equal(y, c + 10 * r + 100 * z + 1000 * (r // 2))


def test_threadgroup_larger_than_the_grid_shrinks_to_it(run: Callable[..., Array]) -> None:
    assert run("y[index] = simd_sum(1.0);", y=((8,), mx.float32), grid=(8, 1, 1)).tolist() == [8.0] * 8


def test_scalars_shapes_strides_and_dimensions_are_passed_like_mlx_does(emulator: Emulator) -> None:
    body = "y[0] = n + x_shape[1] + x_strides[0] + x_ndim; y[1] = few[2];"
    inputs = {"x": mx.zeros((4, 5, 6)), "n": mx.array(1000), "few": mx.array([1, 2, 3])}
    outputs = {"y": ((2,), mx.int32)}
    y = run_metal(emulator, "scalars", "", body, inputs, outputs, (1, 1, 1), (1, 1, 1))["y"]
    assert y.tolist() == [1000 + 5 + 30 + 3, 3]


def test_template_arguments_are_filled_in(run: Callable[..., Array]) -> None:
    template = [("T", mx.float16), ("N", 3), ("B", True)]
    y = run("y[index] = T(x[index]) * T(N) + T(B);", y=((32,), mx.float16), template=template)
    assert np.array_equal(y, np.arange(32, dtype=np.float16) * 3 + 1)


def test_function_that_does_more_than_call_kernels_is_refused(emulator: Emulator) -> None:
    with pytest.raises(ValueError, match="more than call kernels"):
        trace(lambda x: x + 1, mx.zeros((4,)))


# ---- collective operations ----


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("simd_shuffle_xor(v, 5)", lambda v: v[np.arange(32) ^ 5]),
        ("simd_shuffle(v, ushort((lane * 7) % 32))", lambda v: v[np.arange(32) * 7 % 32]),
        ("simd_shuffle_down(v, 3)", lambda v: np.concatenate([v[3:], v[29:]])),
        ("simd_shuffle_up(v, 3)", lambda v: np.concatenate([v[:3], v[:29]])),
        ("simd_broadcast(v, 9)", lambda v: np.full(32, v[9])),
        ("simd_broadcast_first(v)", lambda v: np.full(32, v[0])),
        ("simd_sum(v)", lambda v: np.full(32, v.sum())),
        ("simd_max(v)", lambda v: np.full(32, v.max())),
        ("simd_min(v)", lambda v: np.full(32, v.min())),
        ("simd_any(v > 90.0)", lambda v: np.full(32, float((v > 90).any()))),
        ("simd_all(v > 0.0)", lambda v: np.full(32, float((v > 0).all()))),
    ],
)
def test_collective(run: Callable[..., Array], expression: str, expected: Callable[[Array], Array]) -> None:
    values = np.random.default_rng(0).permutation(100)[:32].astype(np.float32)
    y = run(f"const float v = x[index]; y[index] = {expression};", mx.array(values))
    assert np.array_equal(y, expected(values))


def test_collectives_of_halves_vectors_and_integers(run: Callable[..., Array]) -> None:
    body = """
      const half h = simd_shuffle_xor(half(x[index]), 1);
      const uint2 pair = simd_shuffle_xor(uint2(index, 100 - index), 2);
      const bfloat b = simd_shuffle(bfloat(x[index]), ushort(31 - lane));
      y[index] = float(h) + float(pair.x) + float(pair.y) + float(b);
    """
    i = np.arange(32)
    assert np.array_equal(run(body), (i ^ 1) + 100.0 + (31 - i))


def test_partly_filled_simd_group_reduces_over_its_own_lanes(run: Callable[..., Array]) -> None:
    y = run("y[index] = simd_sum(1.0);", y=((52,), mx.float32), grid=(52, 1, 1), threadgroup=(52, 1, 1))
    assert y.tolist() == [32.0] * 32 + [20.0] * 20


def test_barrier_makes_threadgroup_memory_visible(run: Callable[..., Array]) -> None:
    body = """
      threadgroup float shared[128];
      for (int round = 0; round < 3; ++round) {
        shared[index % 128] = x[index / 4] + float(round);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        y[index] = shared[127 - index % 128];
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
    """
    y = run(body, mx.arange(64).astype(mx.float32), y=((256,), mx.float32), grid=(256, 1, 1), threadgroup=(128, 1, 1))
    i = np.arange(256)
    assert np.array_equal(y, (i // 128 * 128 + 127 - i % 128) // 4 + 2.0)


# ---- what must not happen ----


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # a lane leaves, or goes to another place, while the others wait
        (
            "if (lane == 7) return; y[index] = simd_sum(x[lane]);",
            r"divergent SIMD group.*threads (7|39) have left the kernel",
        ),
        (
            "if (lane < 16) {\n y[index] = simd_sum(1.0);\n} else {\n y[index] = simd_sum(2.0);\n}",
            r"divergent SIMD group.*simd_sum \(line \d+.*simd_sum \(line",
        ),
        ("y[index] = lane < 4 ? simd_max(1.0) : simd_sum(1.0);", r"wait at simd_max.*wait at simd_sum"),
        ("y[index] = simd_shuffle_xor(x[lane], ushort(lane < 9 ? 1 : 2));", r"argument 1\).*argument 2\)"),
        ("if (lane < 9) threadgroup_barrier(mem_flags::mem_none);", "threadgroup_barrier.*have left the kernel"),
        ("if (simdgroup == 1) threadgroup_barrier(mem_flags::mem_none);", "divergent threadgroup"),
        ("y[index] = simd_shuffle(x[0], ushort(32 + lane));", "reads lane .* of a SIMD group of 32"),
        # memory
        ("y[index] = x[index == 40 ? 32 : 0];", "(reads|touches) outside buffer 'x': byte 128 of 128"),
        ("y[index] = x[int(index == 50) * -1];", "(reads|touches) outside buffer 'x': byte -4 of 128"),
        ("y[index == 63 ? 64 : index] = 0;", "(writes|touches) outside buffer 'y': byte 256 of 256"),
        ("(y - 1)[index] = 0;", "writes outside buffer 'y', beside it"),
        ("y[index] = x[100000000];", "which belongs to no buffer"),
        ("device float* p = (device float*)ulong(8); y[index] = *p;", "no matching|invalid cast|which belongs"),
        ("threadgroup float s[4];\n s[lane % 5] = 0;", "index 4 of threadgroup array 's' of 4"),
        ("threadgroup float s[4][8];\n s[lane % 4][lane] = 0;", "of threadgroup array 's' of 8"),
        ("threadgroup float s[4];\n threadgroup float* p = s; p[4] = 0;", "outside threadgroup variable 's': byte 16"),
        ("float a[4];\n for (int i = 0; i <= int(lane); ++i) a[i] = 0;\n y[index] = a[0];", "index 4 out of bounds"),
        ("threadgroup float s[9000];\n s[index] = 0;", "36000 bytes of threadgroup memory, the limit is 32768"),
        ("y[index] = (*(const device float4*)(x + 1)).x;", "misaligned address"),
        # memory that nobody wrote
        ("threadgroup float s[64];\n y[index] = s[index];", "order of threads or on memory nobody wrote"),
        ("threadgroup float s;\n y[index] = s;", "order of threads or on memory nobody wrote"),
        # memory that others write at the same time
        (
            "threadgroup float s[64];\n s[index] = x[lane];\n y[index] = s[63 - index];",
            "'y' depends on the order of threads.*: 6[0-9] of 64",
        ),
        (
            """
            threadgroup float s[2];
            float sum = 0;
            for (int i = 0; i < 2; ++i) {
              if (lane == 0) s[simdgroup] = i;
              threadgroup_barrier(mem_flags::mem_threadgroup);
              sum += s[1 - simdgroup];
            }
            y[index] = sum;
            """,
            "'y' depends on the order of threads",
        ),
        ("y[0] = index;", "'y' depends on the order of threads"),
        # numbers
        ("y[index] = 1 << (lane + 1);", "shift exponent 32 is too large"),
        ("y[index] = 2147483647 + int(lane);", "signed integer overflow"),
        ("y[index] = 7 / int(lane);", "division by zero"),
        ("y[index] = int((x[lane] + 1) * 1e30);", "outside the range of representable values"),
        ("y[index] = clamp(x[index], 2.0, 1.0);", "lower bound is above the upper"),
    ],
)
def test_misbehaviour_is_caught(run: Callable[..., Array], body: str, message: str) -> None:
    with pytest.raises((EmulationError, CompileError), match=rf"(?s){message}"):
        run(body, y=((64,), mx.float32), grid=(64, 1, 1), threadgroup=(64, 1, 1))


def test_uninitialised_thread_memory_is_garbage(run: Callable[..., Array]) -> None:
    y = run("float a[4];\n if (lane > 99) a[lane % 4] = 1;\n y[index] = a[lane % 4];")
    assert not np.any(np.abs(y) < 1e9)


def test_what_a_kernel_leaves_out_is_nan(run: Callable[..., Array]) -> None:
    assert np.isnan(run("if (index != 3) y[index] = 0;")).tolist() == [i == 3 for i in range(32)]


def test_input_may_be_written_where_that_is_said(emulator: Emulator) -> None:
    body = "((device float*)pool)[slots[thread_position_in_grid.x]] = x[thread_position_in_grid.x]; y[0] = 7;"
    kernel = mx.fast.metal_kernel(name="put", input_names=["pool", "slots", "x"], output_names=["y"], source=body)
    read = mx.fast.metal_kernel(
        name="get", input_names=["pool", "after"], output_names=["y"], source="y[0] = pool[2] + after[0];"
    )

    def put_and_get(pool: mx.array, slots: mx.array, x: mx.array) -> Any:
        grid: dict[str, Any] = {"threadgroup": (32, 1, 1), "output_shapes": [(1,)], "output_dtypes": [mx.float32]}
        (done,) = kernel(inputs=[pool, slots, x], grid=(2, 1, 1), **grid)
        return read(inputs=[pool, done], grid=(1, 1, 1), **grid)

    arrays = [mx.zeros((16,)), mx.array([5, 2] + [0] * 6), mx.arange(10, 20).astype(mx.float32)]
    result, pool, *_ = emulator.call(put_and_get, *arrays, in_place={"pool"})
    assert result.tolist() == [18.0]
    assert np.flatnonzero(pool).tolist() == [2, 5]
    with pytest.raises(EmulationError, match="writes to input buffer 'pool'"):
        emulator.call(put_and_get, *arrays)


def test_message_names_the_thread(run: Callable[..., Array]) -> None:
    with pytest.raises(EmulationError, match=r"^threadgroup \(2, 0, 0\), thread \(5, 0, 0\): "):
        run("if (index == 69) y[4096] = 0;", grid=(96, 1, 1))


def test_too_large_a_threadgroup_is_refused(run: Callable[..., Array]) -> None:
    with pytest.raises(EmulationError, match="at most 1024 threads"):
        run("y[index % 32] = 0;", grid=(2048, 1, 1), threadgroup=(1025, 1, 1))


def test_more_buffers_than_metal_has_are_refused(emulator: Emulator) -> None:
    inputs = {f"x{i}": mx.array(i) for i in range(31)}
    with pytest.raises(EmulationError, match="32 buffers; a kernel in Metal has at most 31"):
        run_metal(emulator, "many", "", "y[0] = x0;", inputs, {"y": ((1,), mx.int32)}, (1, 1, 1), (1, 1, 1))


def test_kernel_that_does_not_end_is_stopped(run: Callable[..., Array], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "RUN_TIMEOUT_S", 0.5)
    with pytest.raises(EmulationError, match="does not end"):
        run("while (index < 100) threadgroup_barrier(mem_flags::mem_none);")


@pytest.mark.parametrize(
    "body",
    [
        "threadgroup float s[4]; device float* p = s;",
        "threadgroup float s[4]; thread float* p = &s[1];",
        "threadgroup float* p = y;",
        "float a[4]; device float* p = a;",
        "thread float* p = y;",
        "device float* p = x;",
        "device half* p = y;",
        "x[index] = 1;",
        "const device uint4* p = (const threadgroup uint4*)x;",
        "bfloat b = 1.0;",
        "bfloat b = x[index];",
        "float4 a = half4(1.0h);",
        "y[index] = max(int(index), index);",
        "y[index] = simd_sum(long(index));",
        "y[index] = simd_sum(index > 3);",
        "y[index] = as_type<float>(half(1.0));",
        "y[index] = expf(1.0);",
        "y[index] = __shfl_xor_sync(0xffffffff, x[index], 1);",
        "int n = index; float a[n]; y[index] = a[0];",
        "y[index] = threadIdx.x;",
    ],
)
def test_what_metal_refuses_does_not_compile(run: Callable[..., Array], body: str) -> None:
    with pytest.raises((CompileError, NotMetalError)):
        run(body)


def test_headers_of_the_c_library_are_out_of_reach(run: Callable[..., Array]) -> None:
    with pytest.raises(CompileError, match="cmath"):
        run("y[index] = 0;", header="#include <cmath>\n")


def test_compiler_names_the_line_of_the_text(run: Callable[..., Array]) -> None:
    with pytest.raises(CompileError, match=r"kernel:13:.*nonsense"):
        run("#define A nonsense\n\n y[index] = A;", header="#define B 1\n")


# ---- numbers ----


def tricky_floats() -> Array:
    """Floats around every border of 16-bit formats: ties, the largest, subnormal and tiny numbers, infinities."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 20000, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    ties = np.concatenate([halves + 0x0FFF, halves + 0x1000, halves + 0x1001])
    upper = np.arange(0, 1 << 16, 7, dtype=np.uint32) << 16
    ties = np.concatenate([ties, upper + 0x7FFF, upper + 0x8000, upper + 0x8001])
    values = np.concatenate([bits, halves, ties]).view(np.float32)
    return values[~np.isnan(values)]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_floats_are_rounded_as_mlx_rounds_them(run: Callable[..., Array], dtype: mx.Dtype) -> None:
    x = mx.array(tricky_floats())
    sizes: dict[str, Any] = {"y": (x.shape, dtype), "grid": (x.size, 1, 1), "threadgroup": (256, 1, 1)}
    y = run("y[index] = T(x[index]);", x, template=[("T", dtype)], **sizes)
    assert np.array_equal(y.view(np.uint16), as_numpy(x.astype(dtype, stream=mx.cpu)).view(np.uint16))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_small_floats_widen_exactly(run: Callable[..., Array], dtype: mx.Dtype) -> None:
    x = mx.arange(1 << 16, dtype=mx.uint32).astype(mx.uint16).view(dtype)
    y = run("y[index] = float(x[index]);", x, y=(x.shape, mx.float32), grid=(x.size, 1, 1), threadgroup=(256, 1, 1))
    assert np.array_equal(y, np.array(x.astype(mx.float32, stream=mx.cpu)), equal_nan=True)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_arithmetic_of_small_floats_rounds_after_every_operation(run: Callable[..., Array], dtype: mx.Dtype) -> None:
    x = mx.random.normal((512,), key=mx.random.key(1)).astype(dtype)
    body = "y[index] = (x[index] * x[511 - index] + x[index]) / x[511 - index] - x[index];"
    y = run(body, x, y=(x.shape, dtype), grid=(512, 1, 1), threadgroup=(128, 1, 1))
    with mx.stream(mx.cpu):
        back = x[::-1]
        expected = as_numpy((x * back + x) / back - x)
    assert np.array_equal(y.view(np.uint16), expected.view(np.uint16))


def test_small_floats_mix_with_floats_and_integers(run: Callable[..., Array]) -> None:
    body = """
      const half h = 2049;
      const bfloat b = bfloat(257.0);
      y[0] = h + 1;
      y[1] = h + 1.5f;
      y[2] = b + 1.5f;
      y[3] = float(b * b);
      half c = 1.0h; c += h; c *= 2; y[4] = c;
      y[5] = h > 2047.5 ? 1 : 0;
      y[6] = max(h, 3.0h);
      y[7] = -b;
      y[8] = float(h == half(2048)) + float(b == 256.0);
    """
    y = run(body, y=((9,), mx.float32), grid=(1, 1, 1), threadgroup=(1, 1, 1))
    assert y.tolist() == [2048.0, 2049.5, 257.5, 65536.0, 4096.0, 1.0, 2048.0, -256.0, 2.0]


def test_vectors(run: Callable[..., Array]) -> None:
    body = """
      const float4 a = *(const device float4*)(x + 4 * index), b = float4(1.0, 2.0, 3.0, 4.0);
      float4 c = a * b + 1.0;
      c[1] += dot(a, b);
      const half2 h = as_type<half2>(0x40003c00u);
      const uint4 u = as_type<uint4>(float4(1.0)) >> 16u;
      *(device float4*)(y + 4 * index) = c + float4(float2(h), 0.0, float(u.w));
    """
    y = run(body, y=((2, 4), mx.float32), grid=(2, 1, 1))
    a = np.arange(8, dtype=np.float32).reshape(2, 4)
    b = np.array([1, 2, 3, 4])
    expected = a * b + 1 + np.array([1, 2, 0, 0x3F80])
    expected[:, 1] += (a * b).sum(axis=1)
    assert np.array_equal(y, expected)


def test_functions_of_numbers(run: Callable[..., Array]) -> None:
    body = """
      const float v = x[index] / 8.0;
      y[8 * index] = metal::exp2(v);
      y[8 * index + 1] = fast::exp(-v);
      y[8 * index + 2] = precise::tanh(v);
      y[8 * index + 3] = log(v + 1.0);
      y[8 * index + 4] = fma(v, v, -v);
      y[8 * index + 5] = clamp(v, 1.0, 2.0) + select(v, 100.0, v > 3.0);
      y[8 * index + 6] = fmax(v, numeric_limits<float>::quiet_NaN()) + min(int(lane), 3) + max(2u, lane);
      const bool fits = v < FLT_MAX && numeric_limits<half>::max() == 65504.0h;
      y[8 * index + 7] = isinf(-INFINITY) && fits ? rsqrt(v + 1.0) : -1.0;
    """
    y = run(body, y=((32, 8), mx.float32))
    v, lane = np.arange(32) / 8, np.arange(32)
    expected = [
        *(np.exp2(v), np.exp(-v), np.tanh(v), np.log(v + 1), v * v - v),
        np.clip(v, 1, 2) + np.where(v > 3, 100, v),
        v + np.minimum(lane, 3) + np.maximum(2, lane),
        1 / np.sqrt(v + 1),
    ]
    np.testing.assert_allclose(y, np.stack(expected, axis=1), rtol=3e-7, atol=1e-7)


# ---- the suite's own ways ----


def test_suite_skips_with_a_reason_where_no_compiler_is(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no C\+\+ compiler"):
        emulator_for_tests(pytestconfig, tmp_path_factory)


def test_programs_that_nobody_used_for_days_are_removed(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).touch()
        (tmp_path / f"{name} folder").mkdir()
    long_ago = time.time() - (KEEP_DAYS + 1) * 24 * 3600
    for name in ("old", "old folder"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    remove_old(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new folder"]


def test_design_holds_every_possible_pair_of_values() -> None:
    dimensions = {"a": (1, 2, 3), "b": "xyz", "c": (None, False), "d": (0, 1, 2, 3)}
    cases = all_pairs(dimensions, lambda case: case["a"] != 3 or case["d"] != 0)
    for (one, ones), (other, others) in combinations(dimensions.items(), 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(product(ones, others)) - ({(3, 0)} if (one, other) == ("a", "d") else set())
    assert len(cases) < 20
