"""Chunks computed alone, padded to few shapes, give what their exact shapes give."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from driven import assert_same, prompts, run, submit
from plain_kernels import PlainKernels

from vllm_mlx.core.config import Config
from vllm_mlx.core.step import PrefillRow, Runner
from vllm_mlx.runner import device, lone_chunks, prefill_step
from vllm_mlx.runner.lone_chunks import LoneChunk, LoneChunks, num_scores, padded_tokens

Open = Callable[..., Runner]

pytestmark = pytest.mark.skipif(device.probe().is_gpu, reason="a GPU has kernels of its own")


@pytest.fixture(autouse=True)
def is_soon_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_step, "GROUP_SIZES", (1,))
    monkeypatch.setattr(prefill_step, "LENGTHS", (32,))


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Of every lone chunk: where it starts, its tokens with padding, and the keys of a layer without a window."""
    seen: list[tuple[int, int, int]] = []

    class Recorded(LoneChunk):
        def __init__(self, row: PrefillRow, **shape: Any) -> None:
            super().__init__(row, **shape)
            seen.append((row.start, shape["size"], self.keys(None)[1]))

    monkeypatch.setattr(lone_chunks, "LoneChunk", Recorded)
    return seen


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_lone_chunks_give_the_tokens_of_exact_ones(
    name: str, open_runner: Open, chunks: list[tuple[int, int, int]]
) -> None:
    prompt, end = prompts(300, 40)
    asked = {"first": prompt, "again": prompt, "shorter": prompt[:150]}
    asked |= {"branch": [*prompt[:75], *end], "longer": [*prompt, *end]}
    submits = [submit(key, tokens, max_tokens=5) for key, tokens in asked.items()]
    expected = run(open_runner(name), submits, config=Config(prefix_cache=False))
    assert not chunks
    runner = open_runner(name, kernels=PlainKernels(plans=True), prefill_step_size=100, max_num_seqs=2)
    del chunks[:]  # of trying the model
    config = Config(max_num_seqs=2, prefill_step_size=100)
    assert_same(run(runner, submits, config=config, every=12), expected)  # one after the other
    assert chunks == [
        *((start, 96, start + 96) for start in (0, 96, 192)),
        (288, 32, 512),
        # "again" is but one token
        (128, 32, 256),
        (64, 64, 256),
        (300, 64, 512),
    ]


def test_steps_of_several_prompts_give_the_tokens_of_each_alone(
    open_runner: Open, chunks: list[tuple[int, int, int]]
) -> None:
    submits = [submit(str(i), p, seed=i) for i, p in enumerate(prompts(400, 90, 150, 33, 270))]
    expected = run(open_runner("gpt_oss"), submits, config=Config())
    runner = open_runner("gpt_oss", kernels=PlainKernels(plans=True), prefill_step_size=64, max_num_seqs=4)
    config = Config(max_num_seqs=4, prefill_step_size=64)
    assert_same(run(runner, submits, config=config, every=2), expected)
    assert {size for _, size, _ in chunks} == {32, 64}


def test_prompts_that_are_scored_keep_their_shapes(open_runner: Open, chunks: list[tuple[int, int, int]]) -> None:
    runner = open_runner("llama", kernels=PlainKernels(plans=True))
    del chunks[:]
    run(runner, [submit("a", prompts(600)[0], prompt_logprobs=0)], config=Config(max_num_seqs=2))
    assert not chunks


def test_few_shapes_serve_all_chunks() -> None:
    draw = random.Random(0)
    shapes, of_window = set(), set()
    for _ in range(400):
        start, count = draw.randrange(32768), draw.randrange(1, 2049)
        row = PrefillRow(0, start, (1,) * count, (1,) * (1 + (start + count) // 32), True)
        chunk = LoneChunk(row, size=padded_tokens(count), pads_keys=True)
        shapes.add((padded_tokens(count), chunk.keys(None)[1]))
        first, num_keys = chunk.keys(1024)
        assert first * 32 <= max(0, start - 1023)
        assert first * 32 + num_keys >= start + count
        if start >= 1024 + 32:
            of_window.add((padded_tokens(count), num_keys))
    assert len({size for size, _ in shapes}) <= 11
    assert len({num_keys for _, num_keys in shapes}) <= 25
    assert len(of_window) <= 11


def test_what_is_planned_is_what_chunks_need() -> None:
    lone = LoneChunks(None, None, None, wanted=None, chunk_size=2048, max_tokens=1 << 17)
    assert len(lone._unplanned) == len(set(lone._unplanned)) < 256
    planned = {shape_of(start, size, size=size, pads_keys=pads_keys) for start, size, pads_keys in lone._unplanned}
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randrange(2, 513)
        size = padded_tokens(count)
        assert shape_of(draw.randrange(32768 - size), count, size=size, pads_keys=True) in planned
    small = LoneChunks(None, None, None, wanted=None, chunk_size=64, max_tokens=1 << 17)
    assert len(small._unplanned) <= len(lone._unplanned)
    assert not LoneChunks(None, None, None, wanted=None, chunk_size=64, max_tokens=31)._unplanned


@pytest.mark.parametrize("chunk_size", [1, 31, 33, 2048, 8192, 1 << 20])
def test_whoever_comes_while_shapes_are_planned_waits_for_few_tokens(chunk_size: int) -> None:
    lone = LoneChunks(None, None, None, wanted=None, chunk_size=chunk_size, max_tokens=1 << 21)
    assert 0 < max(size for _, size, _ in lone._unplanned) <= 4096


def shape_of(start: int, count: int, **shape: Any) -> tuple[int, ...]:
    """What plans are kept by: tokens, and keys of layers without a window, with a short one and with a long one."""
    chunk = LoneChunk(PrefillRow(0, start, (1,) * count, (0,) * (1 + (start + count) // 32), True), **shape)
    return shape["size"], *(chunk.keys(window)[1] for window in (None, 128, 4096))


def test_chunks_at_the_end_of_the_context_keep_their_shapes() -> None:
    lone = LoneChunks(None, None, None, wanted=None, chunk_size=2048, max_tokens=4096)
    assert lone.takes(PrefillRow(0, 4000, (1,) * 60, (), True))
    assert not lone.takes(PrefillRow(0, 4000, (1,) * 70, (), True)), "padding has positions that no model may know"


def test_chunks_with_huge_masks_keep_their_shapes() -> None:
    def row(start: int, count: int) -> PrefillRow:
        return PrefillRow(0, start, (1,) * count, (), True)

    lone = LoneChunks(None, None, None, wanted=None, chunk_size=2048, max_tokens=1 << 18)
    assert lone.takes(row(100_000, 500))
    assert lone.takes(row(30_000, 2000))
    assert num_scores(row(100_000, 2000)) > lone_chunks.MAX_SCORES
    assert not lone.takes(row(100_000, 2000))
    assert lone.takes(row(49 * 2048, 2048)), "a full chunk needs no mask"
    assert padded_tokens(2049) == 4096


def test_planning_ends_and_touches_no_page_in_use(open_runner: Open, chunks: list[tuple[int, int, int]]) -> None:
    runner = open_runner(
        "gpt_oss", kernels=PlainKernels(plans=True), prefill_step_size=64, max_model_len=300, max_num_seqs=2
    )
    assert 64 not in {size for _, size, _ in chunks}, "nobody waits for plans"
    first, again = (submit(name, prompts(150)[0]) for name in ("first", "again"))
    config = Config(max_num_seqs=2, prefill_step_size=64)
    expected = run(runner, [first], config=config)["first"]
    before = [mx.array(array) for array in pool_arrays(runner)]
    del chunks[:]
    while runner.idle():
        pass
    padded = [(256 - size, size, 256) for size in (32, 64, 128, 192, 256)]
    assert chunks == [*((start, 64, start + 64) for start in (0, 64, 128, 192)), *padded]
    for kept, array in zip(before, pool_arrays(runner), strict=True):
        assert mx.array_equal(kept[:, 1:], array[:, 1:])
    assert_same(run(runner, [again], config=config), {"again": expected})


def pool_arrays(runner: Any) -> list[mx.array]:
    """Keys and values of all layers, [heads, pages, elements]."""
    return [array.reshape(pool._heads, 64, -1) for pool in runner._pages.pools for array in pool.arrays]


def test_without_memory_for_planning_prompts_are_computed_all_the_same(
    open_runner: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    submits = [submit("a", prompts(150)[0])]
    expected = run(open_runner("llama"), submits, config=Config())
    runner = open_runner("llama", kernels=PlainKernels(plans=True), prefill_step_size=64, max_num_seqs=2)
    with monkeypatch.context() as patch:
        patch.setattr(lone_chunks, "mx", SimpleNamespace(**{**vars(mx), "eval": fail}))
        while runner.idle():
            pass
    assert len([record for record in caplog.records if "out of memory" in record.getMessage()]) == 1
    assert_same(run(runner, submits, config=Config(prefill_step_size=64, max_num_seqs=2)), expected)
