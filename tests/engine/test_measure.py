"""Measuring an engine: scenarios, what is counted, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError, EngineFailure
from vllm_mlx.core.messages import Stats
from vllm_mlx.core.step import MemoryUse, Step
from vllm_mlx.engine.measure import (
    Round,
    Scenario,
    check_scenario,
    measure,
    parse_scenario,
    percentile,
    summarise,
)
from vllm_mlx.engine.thread import ThreadEngine
from vllm_mlx.testing.fake import FakeRunner, fake_factory

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def engine(factory: Any = None, **runner: Any) -> AsyncIterator[ThreadEngine]:
    client = ThreadEngine(factory or fake_factory(**{"step_s": 0.002, **runner}), Config(max_num_seqs=16))
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("1x8", (8,)),
        ("3x64", (64, 64, 64)),
        ("1x16384+2x256", (16384, 256, 256)),
        (" 2X10 + 1x5 ", (10, 10, 5)),
    ],
)
def test_scenario_is_read(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_scenario(text) == Scenario(text, lengths)


@pytest.mark.parametrize("text", ["", "4", "4x", "x4", "0x4", "4x0", "-1x4", "4x4+", "4*4", "1.5x4", "4x4,2x2"])
def test_what_is_no_scenario_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not ROWSxTOKENS"):
        parse_scenario(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5x8", "more rows than --max-num-seqs 4"),
        ("1x60", "68 tokens with the output; the context has 64"),
        ("4x50", "needs 60 pages; the KV cache has 31 .--cache-memory-mb."),
    ],
)
def test_scenario_that_cannot_run_side_by_side_is_refused(text: str, message: str) -> None:
    info = FakeRunner(num_pages=32, page_size=4, max_model_len=64).info
    with pytest.raises(ConfigError, match=message):
        check_scenario(parse_scenario(text), info, max_num_seqs=4, max_tokens=8)
    check_scenario(parse_scenario("4x20"), info, max_num_seqs=4, max_tokens=8)


async def test_round_counts_steps_in_which_all_rows_decode() -> None:
    scenario = parse_scenario("2x100+3x10")
    async with engine() as client:
        found = await measure(client, scenario, max_tokens=24, seed="0")
    assert len(found.ttft_s) == 5
    assert len(found.steps_s) == 24 - 1 - 2 * (24 // 8)
    assert found.num_tokens == 5 * len(found.steps_s)
    assert found.num_preemptions == 0
    # pages of 32 tokens: at least those of prompts and output
    assert found.pages_used is not None
    assert found.pages_used >= 2 * 4 + 3 * 2
    assert found.stats.num_running == 0


async def test_first_token_comes_after_all_chunks_of_a_prompt() -> None:
    step_s, factory = 0.02, fake_factory(step_s=0.02)
    client = ThreadEngine(factory, Config(max_num_seqs=4, prefill_step_size=32))
    await client.start()
    try:
        found = await measure(client, parse_scenario("1x320"), max_tokens=8, seed="0")
    finally:
        await client.stop()
    assert found.ttft_s[0] >= 10 * step_s, "what is told before the first token is none"


async def test_rows_that_started_early_wait_for_those_that_start_late() -> None:
    """A step prefills few tokens here: the first row has long had its tokens when the last one starts."""
    client = ThreadEngine(
        fake_factory(max_model_len=512, step_s=0.001), Config(max_num_seqs=8, prefill_step_size=32, decode_stall_ms=1.0)
    )
    await client.start()
    found = await measure(client, parse_scenario("8x64"), max_tokens=8, seed="0")
    await client.stop()
    assert max(found.ttft_s) > min(found.ttft_s) + 8 * 0.001
    assert found.num_tokens == 8 * len(found.steps_s)


async def test_row_that_reaches_the_context_first_is_an_error() -> None:
    async with engine(max_model_len=24) as client:
        # the context ends before the engine reports its pages
        found = await measure(client, parse_scenario("2x4"), max_tokens=8, seed="1")
        assert found.num_tokens == 2 * len(found.steps_s)
        with pytest.raises(ConfigError, match="ended before all rows had decoded; raise --max-model-len"):
            await measure(client, parse_scenario("2x20"), max_tokens=8, seed="0")


class Breaks(FakeRunner):
    """Fails in its tenth step."""

    def build(self, step: Step) -> Any:
        if step.number == 9:
            raise RuntimeError("the device is lost")
        return super().build(step)


async def test_engine_that_fails_is_an_error() -> None:
    async with engine(lambda progress: Breaks()) as client:
        with pytest.raises(EngineFailure, match="the device is lost"):
            await measure(client, parse_scenario("2x20"), max_tokens=30, seed="0")


def test_figures_are_those_of_all_rounds() -> None:
    rounds = [
        Round(
            ttft_s=(first, first + 0.1),
            steps_s=(step,) * 10,
            num_tokens=20,
            stats=Stats(memory=MemoryUse(peak=pages or 7)),
            pages_used=pages,
            num_preemptions=1,
        )
        for first, step, pages in ((0.1, 0.01, 6), (0.3, 0.03, None))
    ]
    found = summarise(parse_scenario("2x10"), rounds)
    assert found.prefill_tokens_per_s == pytest.approx((20 / 0.2 + 20 / 0.4) / 2)
    assert found.ttft_p50_s == pytest.approx(0.25)
    assert found.decode_step_ms == pytest.approx(20.0)
    assert found.decode_step_p95_ms == pytest.approx(30.0)
    assert found.decode_tokens_per_s == pytest.approx(40 / 0.4)
    assert (found.num_steps, found.pages_used, found.num_preemptions) == (20, 6, 2)
    assert found.peak_memory_bytes == 7


@pytest.mark.parametrize(("percent", "value"), [(0, 1.0), (50, 2.5), (100, 4.0), (95, 3.85)])
def test_percentile_lies_between_its_neighbours(percent: float, value: float) -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], percent) == pytest.approx(value)
    assert percentile([7.0], percent) == 7.0
