"""Streams of every kind, timed with a clock that the test sets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_mlx.bench.sample import Failure, FailureKind, Sample, ToolCall
from vllm_mlx.bench.stream import StreamRecorder, message_of


class Clock:
    """Seconds."""

    now = 10.0

    def __call__(self) -> float:
        return self.now


def record(*events: tuple[float, Any], failure: Failure | None = None) -> Sample:
    """What a recorder makes of events at moments; bytes are fed as they are. The request was sent at 10 s."""
    clock = Clock()
    recorder = StreamRecorder(10.0, now=clock)
    for at, value in events:
        clock.now = at
        recorder.feed(value if isinstance(value, bytes) else b"data: " + json.dumps(value).encode() + b"\n\n")
    return recorder.sample(failure, origin_s=4.0)


def chat(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": finish}]}


DONE = b"data: [DONE]\n\n"
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}}


def test_times_tokens_and_text() -> None:
    sample = record(
        (10.2, chat(role="assistant", content="")),
        (10.5, chat(content="Hel")),
        (10.6, chat(content="lo")),
        (10.9, chat(content="!")),
        (11.0, chat("stop")),
        (11.0, USAGE),
        (11.1, DONE),
    )
    assert sample.is_ok
    assert (sample.content, sample.finish_reason, sample.counted_by) == ("Hello!", "stop", "usage")
    assert (sample.usage_prompt_tokens, sample.completion_tokens, sample.num_chunks) == (7, 5, 3)
    assert sample.started_s == 6.0
    assert sample.ttft_s == pytest.approx(0.5)
    assert sample.gaps_s == pytest.approx((0.1, 0.3))
    assert sample.e2e_s == pytest.approx(1.1)
    assert sample.tpot_s == pytest.approx(0.4 / 4)
    assert sample.decode_tokens_per_s == pytest.approx(10.0)
    assert sample.prompt_tokens_per_s == pytest.approx(14.0)


def test_chunks_are_counted_where_there_is_no_usage() -> None:
    sample = record((10.5, chat(content="a")), (10.6, chat(content="b")), (10.7, chat("length")), (10.7, DONE))
    assert (sample.completion_tokens, sample.counted_by, sample.usage_prompt_tokens) == (2, "chunks", None)
    assert sample.prompt_tokens_per_s is None


def test_text_completion_chunks() -> None:
    end = {"choices": [{"text": "", "finish_reason": "stop"}]}
    sample = record((10.1, {"choices": [{"text": "one"}]}), (10.2, end), (10.2, DONE))
    assert (sample.content, sample.num_chunks, sample.is_ok) == ("one", 1, True)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_the_first_token_too(field: str) -> None:
    sample = record((10.1, chat(**{field: "hm"})), (10.4, chat(content="so")), (10.4, chat("stop")), (10.4, DONE))
    assert (sample.reasoning, sample.content) == ("hm", "so")
    assert sample.ttft_s == pytest.approx(0.1)


def test_tool_calls_are_put_together() -> None:
    def piece(index: int, **function: str) -> dict[str, Any]:
        return chat(tool_calls=[{"index": index, "function": function}])

    sample = record(
        (10.1, piece(0, name="find", arguments="")),
        (10.2, piece(0, arguments='{"city":')),
        (10.3, piece(0, arguments=' "Paris"}')),
        (10.4, piece(1, name="stop", arguments="{}")),
        (10.5, chat("tool_calls")),
        (10.5, DONE),
    )
    assert sample.tool_calls == (ToolCall("find", '{"city": "Paris"}'), ToolCall("stop", "{}"))
    assert sample.num_chunks == 4


def test_cached_tokens_are_read() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 8}}
    sample = record((10.1, chat("stop", content="x")), (10.1, {"choices": [], "usage": usage}), (10.1, DONE))
    assert sample.cached_tokens == 8


@pytest.mark.parametrize(
    ("events", "kind", "words"),
    [
        ([chat(content="x"), DONE], FailureKind.BROKEN_STREAM, "finish_reason"),
        ([chat(content="x")], FailureKind.BROKEN_STREAM, "finish_reason"),
        ([chat("stop", content="x")], FailureKind.BROKEN_STREAM, "DONE"),
        ([], FailureKind.BROKEN_STREAM, "finish_reason"),
        ([chat(content="x"), {"error": {"message": "GPU lost"}}, DONE], FailureKind.ERROR_EVENT, "GPU lost"),
        ([b"data: {oops\n\n", DONE], FailureKind.MALFORMED, "oops"),
        ([{"choices": "none"}, DONE], FailureKind.MALFORMED, "choices"),
    ],
)
def test_stream_that_is_not_an_answer_is_a_failure(events: list[Any], kind: FailureKind, words: str) -> None:
    sample = record(*((10.1, event) for event in events))
    assert sample.failure is not None
    assert sample.failure.kind is kind
    assert words in sample.failure.message


def test_failure_of_the_transport_stands() -> None:
    failure = Failure(FailureKind.STATUS, "no", 500)
    assert record(failure=failure).failure == failure
    assert failure.label == "status 500"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ({"message": "a"}, "a"),
        ({"error": {"message": "b"}}, "b"),
        ({"detail": "c"}, "c"),
        ("d", "d"),
        ({"code": 1}, "{'code': 1}"),
    ],
)
def test_error_objects_of_every_dialect_are_understood(error: Any, text: str) -> None:
    assert message_of(error) == text


@pytest.mark.parametrize(
    "text", ["CUDA out of memory", "Insufficient Memory (kIOGPU)", "malloc failed to allocate", "OOM"]
)
def test_lack_of_memory_is_recognised(text: str) -> None:
    assert Failure(FailureKind.STATUS, text, 500).is_out_of_memory
    assert not Failure(FailureKind.STATUS, "no room for this model", 404).is_out_of_memory
