"""The product's Metal kernels, executed without a Mac and compared with attention as it is defined."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from runner.kernel_cases import DIMENSIONS, DTYPES, decode_cases, describe, plan_for, positions_for
from runner.metal.attention import LIMITS, Batch, attend, errors, make_batch, widen
from runner.metal.emulator import EmulationError, Emulator, Trace, as_numpy, trace
from runner.metal.support import emulator_for_tests

from vllm_mlx.runner.kernels import paging, source, split
from vllm_mlx.runner.kernels.check import pool_format
from vllm_mlx.runner.kernels.decode import PagedAttention
from vllm_mlx.runner.kernels.paging import PageKernels
from vllm_mlx.runner.kernels.plan import PADDED, DecodePlan, plan_items
from vllm_mlx.runner.kernels.pools import PoolFormat
from vllm_mlx.runner.kernels.variant import DecodeVariant, geometry

POOLS = {"key_pool", "value_pool", "key_scales", "value_scales"}
TOKEN = mx.zeros((1,), mx.int32)


# ---- decode ----

DECODE_CASES = decode_cases()


def decode_call(
    variant: DecodeVariant, batch: Batch, plan: DecodePlan
) -> tuple[Callable[..., mx.array], list[mx.array]]:
    """The product's function and its arguments."""
    attention = PagedAttention(variant, "metal")
    names = ("table", "slots", "items", "starts", "after", *(("sinks",) if variant.has_sinks else ()))
    integers = [mx.array(array) for array in (batch.table, batch.slots, plan.items, plan.starts)]
    arrays = [batch.queries, *batch.pools, *integers, TOKEN]
    arrays += [] if batch.sinks is None else [batch.sinks]
    arrays += batch.scales or []

    def call(queries: mx.array, keys: mx.array, values: mx.array, *rest: mx.array) -> mx.array:
        scales = rest[-2:] if variant.bits else None
        return attention(queries, keys, values, scales=scales, **dict(zip(names, rest, strict=False)))

    return call, arrays


def decode_case(variant: DecodeVariant, items: str) -> tuple[Batch, Callable[..., mx.array], list[mx.array]]:
    seed = DECODE_CASES.index((variant, items)) if (variant, items) in DECODE_CASES else 0
    batch = make_batch(variant, positions_for(variant, seed=seed), seed=seed)
    return batch, *decode_call(variant, batch, plan_for(variant, batch.positions, items))


@pytest.fixture(scope="session")
def emulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """With the kernels of all chosen tests compiled, side by side."""
    made = emulator_for_tests(request.config, tmp_path_factory)
    cases = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [spec.params["case"] for spec in cases if spec is not None and "case" in spec.params]
    made.prepare([decode_trace(*case) for case in chosen if isinstance(case[0], DecodeVariant)])
    return made


def decode_trace(variant: DecodeVariant, items: str) -> Trace:
    _, call, arrays = decode_case(variant, items)
    return trace(call, *arrays)


def decode_errors(emulator: Emulator, variant: DecodeVariant, items: str) -> list[float]:
    """Relative error of every row."""
    batch, call, arrays = decode_case(variant, items)
    out, *_ = emulator.call(call, *arrays)
    return errors(out, attend(variant, batch))


@pytest.mark.parametrize("case", DECODE_CASES, ids=describe)
def test_decode_is_attention(emulator: Emulator, case: tuple[DecodeVariant, str]) -> None:
    found = decode_errors(emulator, *case)
    assert max(found) <= LIMITS[case[0].dtype], found


def test_cases_cover_every_value() -> None:
    variants = [variant for variant, _ in DECODE_CASES]
    assert {variant.group for variant in variants} == set(range(1, 17))
    assert {variant.num_queries for variant in variants} == set(range(1, 9))
    assert {(variant.key_dim, variant.value_dim) for variant in variants} == set(DIMENSIONS["dims"])
    wide = {(variant.dtype, geometry(variant).chunk_words) for variant in variants}
    assert {chunk_words for _, chunk_words in wide} >= {2, 4}


ODD_SIZES = [(18, 6, "float16"), (40, 24, "bfloat16"), (5, 7, "float32")]


@pytest.mark.parametrize(("key_dim", "value_dim", "dtype"), ODD_SIZES)
def test_odd_head_sizes_fall_back_to_narrow_loads(emulator: Emulator, key_dim: int, value_dim: int, dtype: str) -> None:
    variant = make_variant(key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    assert max(decode_errors(emulator, variant, "page by page")) <= LIMITS[dtype]


def test_window_of_one_token_gives_that_tokens_value(emulator: Emulator) -> None:
    variant = make_variant(window=1, num_queries=3)
    assert decode_errors(emulator, variant, "page by page") == [0.0] * 5


def test_sizes_without_a_layout_are_refused() -> None:
    with pytest.raises(ValueError, match="no decode kernel for heads of 576 and 512"):
        PagedAttention(make_variant(key_dim=576, value_dim=512), "metal")


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_of_several_planned_items_is_joined(emulator: Emulator, dtype: str, bits: int | None) -> None:
    variant = make_variant(dtype=dtype, bits=bits)
    batch = make_batch(variant, [900, PADDED, 3, 300], seed=5)
    plan = plan_items(batch.positions, capacity=32, page_size=variant.page_size)
    assert plan.starts.tolist() == [0, 4, 4, 5, 7]
    call, arrays = decode_call(variant, batch, plan)
    out, *_ = emulator.call(call, *arrays)
    assert max(errors(out, attend(variant, batch))) <= LIMITS[dtype]


def test_batch_of_nothing_but_padding_is_zero(emulator: Emulator) -> None:
    variant = make_variant()
    batch = make_batch(variant, [0, 0], seed=0)
    plan = plan_items(np.array([PADDED, PADDED], np.int32), capacity=4, page_size=variant.page_size)
    call, arrays = decode_call(variant, batch, plan)
    out, *_ = emulator.call(call, *arrays)
    assert not out.any()


def make_variant(**changes: Any) -> DecodeVariant:
    fields: dict[str, Any] = {"key_dim": 64, "value_dim": 64, "heads": 6, "kv_heads": 2, "dtype": "float32"}
    fields |= {"page_size": 32, "scale": 0.125} | changes
    return DecodeVariant(**fields)


# ---- a wrong kernel is noticed ----

RICH = {"num_queries": 3, "window": 40, "softcap": 2.0, "has_sinks": True, "key_dim": 96, "value_dim": 64}
MUTATIONS = [
    ("DECODE_BODY", r"position \+ 1 - WINDOW", "position + 2 - WINDOW"),
    ("DECODE_BODY", r"token <= last", "token < last"),
    ("DECODE_BODY", r"token > last - WINDOW", "token >= last - WINDOW"),
    ("DECODE_BODY", r"EXP2\(top\[v\] - best\)", "EXP2(best - top[v])"),
    ("DECODE_BODY", r"sum\[v\] \*= keep;", ""),
    ("DECODE_BODY", r"o = LANES / 2; o > 0", "o = LANES / 2; o > 1"),
    ("DECODE_BODY", r"token % PAGE", "(token + 1) % PAGE"),
    ("DECODE_BODY", r"slots\[row\] \* table_shape\[1\]", "row * table_shape[1]"),
    ("DECODE_BODY", r"\* KV_VECTORS \+ vector;", "* KV_VECTORS + vector / 2 * 2;"),
    ("DECODE_BODY", r"min\(end - 1, ", "min(end, "),
    ("DECODE_BODY", r"BARRIER\(\);(?=\s+if)", ""),
    ("DECODE_BODY", r"BARRIER\(\);(?=\s+}\s+$)", ""),
    ("DECODE_BODY", r"if \(row < 0\) return;", "if (row < 0 || lane == 31) return;"),
    ("COMBINE_BODY", r"EXP2\(sink - best\)", "0.f"),
    ("COMBINE_BODY", r"vector / NUM_QUERIES", "vector % NUM_QUERIES"),
    ("COMBINE_BODY", r"BARRIER\(\);", ""),
    ("COMBINE_BODY", r"< count;", "< count - 1;"),
    ("COMBINE_BODY", r"joined \* factor", "joined"),
    ("UNPACK", r"= AS_FLOAT\(words\[i\]\)", "= -AS_FLOAT(words[i])"),
]


@pytest.mark.parametrize(("text", "right", "wrong"), MUTATIONS)
def test_broken_kernel_is_noticed(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, text: str, right: str, wrong: str
) -> None:
    body, num_changes = re.subn(right, wrong, getattr(source, text))
    assert num_changes, "the kernel has changed: this test needs another way to break it"
    monkeypatch.setattr(source, text, body)
    try:
        found = decode_errors(emulator, make_variant(**RICH), "page by page")
    except EmulationError:
        return
    assert not max(found) <= 10 * LIMITS["float32"], found


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_kernel_that_the_mutations_break_is_right_before(emulator: Emulator, bits: int | None) -> None:
    assert max(decode_errors(emulator, make_variant(**RICH, bits=bits), "page by page")) <= LIMITS["float32"]


PACKED_MUTATIONS = [
    (8, "DECODE_BODY", r"META_SCALE\(key_meta\[u\]\[c\]\) \* ", ""),
    (8, "DECODE_BODY", r"\* META_SCALE\(value_meta\[u\]\[c\]\)", ""),
    (8, "DECODE_BODY", r"\* PER_CHUNK / GROUP;", "* PER_CHUNK / GROUP / 2;"),
    (8, "UNPACK_PACKED", r"8388736", "8388735"),
    (4, "DECODE_BODY", r"\+ added\[v\]\[i / PER_CHUNK\]", ""),
    (4, "DECODE_BODY", r"\* FACTOR\(i\) \+ added", "+ added"),
    (4, "DECODE_BODY", r"\* query_sums\[v\]\[c\]", ""),
    (4, "UNPACK_PACKED", r">> 16 \* h", ">> 8 * h"),
]


@pytest.mark.parametrize(("bits", "text", "right", "wrong"), PACKED_MUTATIONS)
def test_broken_kernel_for_quantised_pages_is_noticed(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, bits: int, text: str, right: str, wrong: str
) -> None:
    body, num_changes = re.subn(right, wrong, getattr(source, text))
    assert num_changes, "the kernel has changed: this test needs another way to break it"
    monkeypatch.setattr(source, text, body)
    found = decode_errors(emulator, make_variant(**RICH, bits=bits), "page by page")
    assert not max(found) <= 10 * LIMITS["float32"], found


# ---- writing and reading pages ----

FORMATS = [
    PoolFormat(kv_heads=2, key_dim=64, value_dim=64, dtype="float32", page_size=16),
    PoolFormat(kv_heads=3, key_dim=80, value_dim=80, dtype="float16", page_size=32),
    PoolFormat(kv_heads=1, key_dim=192, value_dim=128, dtype="bfloat16", page_size=64),
    PoolFormat(kv_heads=1, key_dim=576, value_dim=512, dtype="bfloat16", page_size=16),
    PoolFormat(kv_heads=3, key_dim=36, value_dim=4, dtype="float16", page_size=16),
    PoolFormat(kv_heads=2, key_dim=18, value_dim=6, dtype="bfloat16", page_size=32),
]


def random_array(shape: tuple[int, ...], dtype: str, *, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, dtype))


@pytest.mark.parametrize("pools", FORMATS, ids=lambda pools: f"{pools.key_dim}x{pools.value_dim}-{pools.dtype}")
@pytest.mark.parametrize(("rows", "tokens"), [(1, 21), (5, 1)], ids=["prompt", "decode"])
def test_tokens_are_written_where_their_slots_say_and_read_back(
    emulator: Emulator, pools: PoolFormat, rows: int, tokens: int
) -> None:
    kernels, num_pages = PageKernels(pools, "metal"), 6
    places = num_pages * pools.page_size
    dims = (pools.key_dim, pools.value_dim)
    before = [random_array((pools.kv_heads * places, dim), pools.dtype, seed=dim) for dim in dims]
    new = [random_array((rows, pools.kv_heads, tokens, dim), pools.dtype, seed=dim + 1) for dim in dims]
    slots = np.random.default_rng(0).permutation(places)[: rows * tokens].astype(np.int32)
    table = np.array([[3, 0, 5], [1, 1, 4]], np.int32)

    def write_and_read(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        keys, values, new_keys, new_values, where, pages, after = arrays
        written = kernels.write(keys, values, new_keys, new_values, slots=where, after=after)
        return kernels.read(keys, pages, after=written), kernels.read(values, pages, after=written)

    arrays = [*before, *new, mx.array(slots), mx.array(table), TOKEN]
    read_keys, read_values, keys, values, *_ = emulator.call(write_and_read, *arrays, in_place=POOLS)
    for pool, read, start, added in zip((keys, values), (read_keys, read_values), before, new, strict=True):
        expected = as_numpy(start).reshape(pools.kv_heads, places, -1).copy()
        expected[:, slots] = as_numpy(added).transpose(1, 0, 2, 3).reshape(pools.kv_heads, rows * tokens, -1)
        assert np.array_equal(pool.reshape(expected.shape), expected)
        pages = expected.reshape(pools.kv_heads, num_pages, pools.page_size, -1)[:, table]
        assert np.array_equal(read, pages.transpose(1, 0, 2, 3, 4).reshape(read.shape))


PACKED_FORMATS = [
    PoolFormat(kv_heads=2, key_dim=64, value_dim=64, dtype="float32", page_size=16, bits=8),
    PoolFormat(kv_heads=3, key_dim=80, value_dim=80, dtype="float16", page_size=32, bits=4),
    PoolFormat(kv_heads=1, key_dim=192, value_dim=128, dtype="bfloat16", page_size=64, bits=8),
    PoolFormat(kv_heads=1, key_dim=48, value_dim=96, dtype="bfloat16", page_size=16, bits=4),
    PoolFormat(kv_heads=2, key_dim=24, value_dim=8, dtype="float32", page_size=32, bits=4),
]


@pytest.mark.parametrize("pools", PACKED_FORMATS, ids=lambda pools: f"{pools.key_dim}x{pools.value_dim}-{pools.bits}")
@pytest.mark.parametrize(("rows", "tokens"), [(1, 21), (5, 1)], ids=["prompt", "decode"])
def test_quantised_tokens_are_what_plain_operations_make_of_them(
    emulator: Emulator, pools: PoolFormat, rows: int, tokens: int
) -> None:
    kernels, packing, num_pages = PageKernels(pools, "metal"), pools.packing, 6
    assert packing is not None
    dims, places = (pools.key_dim, pools.value_dim), num_pages * pools.page_size
    before = [random_array((pools.kv_heads * places, dim), "float32", seed=dim) for dim in dims]
    new = [5 * random_array((rows, pools.kv_heads, tokens, dim), pools.dtype, seed=dim + 1) for dim in dims]
    slots = np.random.default_rng(0).permutation(places)[: rows * tokens].astype(np.int32)
    table = np.array([[3, 0, 5], [1, 1, 4]], np.int32)
    (key_words, key_scales), (value_words, value_scales) = (packing.pack(array) for array in before)

    def write_and_read(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        keys, values, new_keys, new_values, where, pages, after, *scales = arrays
        written = kernels.write(
            keys, values, new_keys, new_values, slots=where, after=after, scales=(scales[0], scales[1])
        )
        read = kernels.read(keys, pages, after=written, scales=scales[0])
        return read, kernels.read(values, pages, after=written, scales=scales[1])

    arrays = [key_words, value_words, *new, mx.array(slots), mx.array(table), TOKEN, key_scales, value_scales]
    out = emulator.call(write_and_read, *arrays, in_place=POOLS)
    for i, (read, words, scales) in enumerate(((out[0], out[2], out[9]), (out[1], out[3], out[10]))):
        expected = [np.array(array).reshape(pools.kv_heads, places, -1) for array in packing.pack(before[i])]
        for array, added in zip(expected, packing.pack(new[i]), strict=True):
            array[:, slots] = np.array(added).transpose(1, 0, 2, 3).reshape(pools.kv_heads, rows * tokens, -1)
        assert np.array_equal(words.reshape(expected[0].shape), expected[0])
        assert np.array_equal(scales.reshape(expected[1].shape), expected[1])
        plain = packing.unpack(mx.array(expected[0]), mx.array(expected[1]), getattr(mx, pools.dtype))
        by_page = as_numpy(plain).reshape(pools.kv_heads, num_pages, pools.page_size, -1)
        pages = by_page[:, table].transpose(1, 0, 2, 3, 4).reshape(read.shape)
        assert np.allclose(widen(read), widen(pages), rtol=LIMITS[pools.dtype], atol=1e-5)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("slots[row * tokens + token]", "slots[row + token]"),
        ("if (row < keys_shape[0])", "if (row <= keys_shape[0])"),
        ("to * VALUE_CHUNKS + c", "to * KEY_CHUNKS + c"),
        ("[from * KEY_CHUNKS + chunk]", "[from * KEY_CHUNKS]"),
    ],
)
def test_broken_write_is_noticed(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    assert right in paging.WRITE_BODY, "the kernel has changed: this test needs another way to break it"
    monkeypatch.setattr(paging, "WRITE_BODY", paging.WRITE_BODY.replace(right, wrong))
    with pytest.raises((AssertionError, EmulationError)):
        test_tokens_are_written_where_their_slots_say_and_read_back(emulator, FORMATS[2], 2, 7)


@pytest.mark.parametrize(
    ("widths", "dtype"), [((48, 16, 16), "float32"), ((6, 2, 4), "bfloat16"), ((72, 24, 24, 8), "float16")]
)
def test_rows_are_split_into_whole_parts(emulator: Emulator, widths: tuple[int, ...], dtype: str) -> None:
    joined = random_array((7, 3, sum(widths)), dtype, seed=3)
    *parts, _ = emulator.call(split.SplitKernel(widths, getattr(mx, dtype), "metal"), joined)
    bounds = np.cumsum(widths)[:-1]
    for part, expected in zip(parts, np.split(as_numpy(joined), bounds, axis=-1), strict=True):
        assert np.array_equal(part, expected)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("row * {width}", "row * {end}"), ("chunk < {end}", "chunk <= {end}"), ("chunk - {begin}", "chunk")],
)
def test_broken_split_is_noticed(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    assert right in split.PART, "the kernel has changed: this test needs another way to break it"
    monkeypatch.setattr(split, "PART", split.PART.replace(right, wrong))
    with pytest.raises((AssertionError, EmulationError)):
        test_rows_are_split_into_whole_parts(emulator, (48, 16, 16), "float32")


def test_parts_of_half_words_are_not_split_by_kernel() -> None:
    with pytest.raises(ValueError, match="whole words"):
        split.SplitKernel((7, 3), mx.float16, "metal")


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_sees_what_was_written_just_before(emulator: Emulator, dtype: str) -> None:
    """A decode step: the new token's key and value are written, then every row attends."""
    variant = make_variant(dtype=dtype)
    batch = make_batch(variant, [4, 64, 95], seed=2)
    attention, kernels = PagedAttention(variant, "metal"), PageKernels(pool_format(variant), "metal")
    plan = plan_items(batch.positions, capacity=8, page_size=variant.page_size)
    pages = batch.table[batch.slots, batch.positions // variant.page_size]
    slots = pages * variant.page_size + batch.positions % variant.page_size
    places = batch.keys.shape[0] // variant.kv_heads
    new, old = [], []
    for pool in (batch.keys, batch.values):
        by_head = pool.reshape(variant.kv_heads, places, -1)
        new.append(by_head[:, mx.array(slots)].transpose(1, 0, 2)[:, :, None])
        by_head[:, mx.array(slots)] = mx.array(float("nan"), by_head.dtype)
        old.append(by_head.reshape(pool.shape))

    def step(*arrays: mx.array) -> mx.array:
        queries, keys, values, new_keys, new_values, where, table, rows, items, starts, after = arrays
        written = kernels.write(keys, values, new_keys, new_values, slots=where, after=after)
        return attention(queries, keys, values, table=table, slots=rows, items=items, starts=starts, after=written)

    integers = [mx.array(array) for array in (slots, batch.table, batch.slots, plan.items, plan.starts)]
    out, *_ = emulator.call(step, batch.queries, *old, *new, *integers, TOKEN, in_place=POOLS)
    assert not np.isnan(widen(out)).any()
    assert max(errors(out, attend(variant, batch))) <= LIMITS[dtype]


# ---- beside MLX's own names ----


def test_names_do_not_clash_with_those_of_mlx_in_front_of_every_kernel() -> None:
    folder = Path(next(iter(mx.__path__))) if hasattr(mx, "__path__") else Path(mx.__file__).parent
    headers = folder / "include" / "mlx" / "backend" / "metal" / "kernels"
    if not headers.is_dir():
        pytest.skip("this build of MLX comes without its Metal headers")
    prelude = [(headers / name).read_text() for name in ("utils.h", "bf16.h", "bf16_math.h", "complex.h", "defines.h")]
    theirs = set(re.findall(r"\w+", "".join(prelude)))
    variant = make_variant(**RICH, dtype="float16")
    text = source.decode_text(variant, geometry(variant), "metal")[0] + source.combine_text(variant, "metal")[0]
    text += paging.write_text(FORMATS[0], "metal")[0]
    text += "".join(paging.read_text(pools, pools.key_dim, "metal")[0] for pools in PACKED_FORMATS)
    ours = set(re.findall(r"#define (\w+)|\btypedef [\w ]+ (\w+);|\bINLINE \w+ (\w+)\(", text))
    names = {name for match in ours for name in match if name}
    assert {"MAX", "halves", "Chunk"} <= names
    assert not names & theirs
