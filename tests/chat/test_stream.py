"""What a stream does when an engine misbehaves; an engine of scripted outputs stands in for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from vllm_mlx.chat.choice import ChoiceDecoder
from vllm_mlx.chat.stream import EventStream
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.errors import EngineFailure, RequestTimeout, ServerBusy
from vllm_mlx.core.events import Event, TextDelta
from vllm_mlx.core.messages import EngineState, EngineStatus, FinishReason, Output, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import RunnerInfo

pytestmark = pytest.mark.anyio

Script = Sequence[Output | Exception | None]
"""Outputs in order; an exception is raised, None waits until the sequence is aborted."""


class ScriptedEngine:
    """Satisfies `EngineClient` as far as a stream needs it."""

    def __init__(self, **scripts: Script) -> None:
        self._scripts = scripts
        self.closed: list[str] = []

    async def generate(self, submit: Submit) -> AsyncGenerator[Output, None]:
        try:
            for item in self._scripts[submit.request_id]:
                if item is None:
                    await asyncio.Event().wait()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            self.closed.append(submit.request_id)

    def status(self) -> EngineStatus:
        return EngineStatus(EngineState.READY)

    async def start(self) -> RunnerInfo:
        raise NotImplementedError

    async def wait_failed(self) -> str:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError


def stream(
    engine: ScriptedEngine, tokenizer: Tokenizer, *request_ids: str, timeout_s: float | None = None
) -> EventStream:
    sampling = SamplingParams(stop=("S",))
    choices = [
        (
            Submit(request_id, Prompt((5,)), sampling),
            ChoiceDecoder(tokenizer, choice=choice, prompt_ids=(5,), sampling=sampling),
        )
        for choice, request_id in enumerate(request_ids)
    ]
    return EventStream(engine, choices, prompt_tokens=1, timeout_s=timeout_s)


def output(tokenizer: Tokenizer, text: str, finish: FinishReason | None = None) -> Output:
    return Output("", tokenizer.encode(text, add_special_tokens=False), finish=finish)


async def read(events: EventStream) -> list[Event]:
    return [event async for event in events]


@pytest.mark.parametrize(
    ("last", "error", "status"),
    [
        (Output("", finish=FinishReason.ERROR, message="boom"), EngineFailure, 500),
        (Output("", finish=FinishReason.REJECTED, message="full"), ServerBusy, 503),
        (Output("", finish=FinishReason.ABORT), EngineFailure, 500),
    ],
)
async def test_failure_comes_after_the_events_before_it(
    byte_level: Tokenizer, last: Output, error: type[EngineFailure], status: int
) -> None:
    engine = ScriptedEngine(a=[output(byte_level, "x"), last])
    async with stream(engine, byte_level, "a") as events:
        assert await anext(events) == TextDelta(0, "x")
        with pytest.raises(error, match=last.message or "failed") as caught:
            await anext(events)
        assert caught.value.status == status
        with pytest.raises(error):
            await events.ready(1.0)


async def test_failure_of_one_choice_ends_the_others(byte_level: Tokenizer) -> None:
    engine = ScriptedEngine(a=[None], b=[Output("", finish=FinishReason.REJECTED)])
    async with stream(engine, byte_level, "a", "b") as events:
        with pytest.raises(ServerBusy):
            await events.ready()
    assert sorted(engine.closed) == ["a", "b"]


async def test_unexpected_exception_is_raised_to_the_reader(byte_level: Tokenizer) -> None:
    async with stream(ScriptedEngine(a=[KeyError("bug")]), byte_level, "a") as events:
        with pytest.raises(KeyError, match="bug"):
            await read(events)


async def test_sequence_that_ends_without_a_reason_is_a_failure(byte_level: Tokenizer) -> None:
    async with stream(ScriptedEngine(a=[output(byte_level, "x")]), byte_level, "a") as events:
        with pytest.raises(EngineFailure, match="without a reason"):
            await read(events)


async def test_stop_string_aborts_only_its_own_sequence(byte_level: Tokenizer) -> None:
    length = output(byte_level, "z", FinishReason.LENGTH)
    engine = ScriptedEngine(a=[output(byte_level, "xS"), None], b=[output(byte_level, "y"), length])
    async with stream(engine, byte_level, "a", "b") as events:
        texts = [(event.choice, event.text) for event in await read(events) if isinstance(event, TextDelta)]
    assert sorted(texts) == [(0, "x"), (1, "y"), (1, "z")]


async def test_outputs_that_nobody_reads_yet_are_kept(byte_level: Tokenizer) -> None:
    engine = ScriptedEngine(a=[output(byte_level, "x"), output(byte_level, "y", FinishReason.LENGTH)])
    async with stream(engine, byte_level, "a", timeout_s=30.0) as events:
        for _ in range(10):
            await asyncio.sleep(0)
        assert engine.closed == ["a"]
        assert len(await read(events)) == 3
        assert await read(events) == []


async def test_timeout_comes_after_the_events_before_it(byte_level: Tokenizer) -> None:
    async with stream(ScriptedEngine(a=[output(byte_level, "x"), None]), byte_level, "a", timeout_s=0.01) as events:
        assert await anext(events) == TextDelta(0, "x")
        with pytest.raises(RequestTimeout):
            await anext(events)


async def test_ready_waits_no_longer_than_told(byte_level: Tokenizer) -> None:
    async with stream(ScriptedEngine(a=[output(byte_level, "x"), None]), byte_level, "a") as events:
        assert await events.ready()
        assert await anext(events) == TextDelta(0, "x")
        assert not await events.ready(0.001)


async def test_closing_before_the_start_submits_nothing(byte_level: Tokenizer) -> None:
    engine = ScriptedEngine(a=[None])
    await stream(engine, byte_level, "a").aclose()
    assert engine.closed == []
