"""Events of the chat service to events and items of the Responses API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from vllm_mlx.api.responses.run import frames
from vllm_mlx.api.sealed import Sealer
from vllm_mlx.api.wire.freeform import FreeformReader
from vllm_mlx.api.wire.responses.answers import ResponseAnswer
from vllm_mlx.api.wire.responses.encoder import ResponseEncoder
from vllm_mlx.api.wire.responses.items import ResolvedItem
from vllm_mlx.api.wire.responses.tools import OfferedTools, Origin
from vllm_mlx.api.wire.responses.transcript import messages_of, read_items
from vllm_mlx.core.chat import ToolCall
from vllm_mlx.core.errors import EngineFailure, InvalidRequest
from vllm_mlx.core.events import Event, Finish, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from vllm_mlx.core.messages import FinishReason

STOP = Finish(0, FinishReason.STOP, Usage(10, 5, cached_tokens=4, reasoning_tokens=2))
CUT = Finish(0, FinishReason.LENGTH, Usage(10, 5))
OFFERED = OfferedTools(
    (), {"f": Origin("f"), "space__g": Origin("g", "space"), "patch": Origin("patch", is_freeform=True)}
)
SEALER = Sealer(b"k" * 32)


def encoder_of(status: str = "in_progress", **options: Any) -> ResponseEncoder:
    head = ResponseAnswer(
        id="resp_00",
        created_at=1,
        status=status,
        model="m",
        reasoning={},
        temperature=1.0,
        text={},
        tool_choice="auto",
        tools=[],
        top_p=1.0,
    )
    return ResponseEncoder(head, offered=OFFERED, **options)


def written(script: Sequence[Event], **options: Any) -> list[dict[str, Any]]:
    """All events of the stream, with their numbers checked."""
    encoder = encoder_of(**options)
    found = [*encoder.opening()]
    for event in script:
        found += encoder.chunks(event)
    found += encoder.ending()
    plain: list[dict[str, Any]] = [msgspec.json.decode(msgspec.json.encode(event)) for event in found]
    assert [event["sequence_number"] for event in plain] == list(range(len(plain)))
    assert encoder.is_ended
    return plain


def kinds(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def joined(events: Sequence[dict[str, Any]], kind: str) -> str:
    return "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")


def test_reasoning_text_and_calls_come_in_the_documented_order() -> None:
    events = written(
        [
            ReasoningDelta(0, "hm"),
            TextDelta(0, "So:"),
            ToolCallDelta(0, 0, "call_a", "f"),
            ToolCallDelta(0, 0, arguments='{"a": '),
            ToolCallDelta(0, 0, arguments="1}"),
            ToolCallDelta(0, 1, "call_b", "space__g", "{}"),
            STOP,
        ]
    )
    call = ["output_item.added", "function_call_arguments.delta"]
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        *call,
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        *call,
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    last = events[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert (last["output"][2]["call_id"], last["output"][2]["arguments"]) == ("call_a", '{"a": 1}')
    assert (last["output"][3]["name"], last["output"][3]["namespace"]) == ("g", "space")
    assert "namespace" not in last["output"][2]
    assert len({item["id"] for item in last["output"]}) == 4
    assert last["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert last["usage"]["output_tokens_details"]["reasoning_tokens"] == 2
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]


def test_every_event_is_sent_under_its_type() -> None:
    encoder = encoder_of()
    said = [TextDelta(0, "x"), ToolCallDelta(0, 0, "call_a", "f", "{}"), STOP]
    data = frames([*encoder.opening(), *(event for one in said for event in encoder.chunks(one)), *encoder.ending()])
    for frame in data.decode().strip().split("\n\n"):
        name, event = frame.split("\n")
        assert name == f"event: {json.loads(event.removeprefix('data: '))['type']}"


def test_a_summary_is_the_reasoning_where_one_was_asked_for() -> None:
    events = written([ReasoningDelta(0, "one "), ReasoningDelta(0, "two"), TextDelta(0, "x"), STOP], has_summary=True)
    assert kinds(events)[3:8] == [
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
    ]
    item = events[-1]["response"]["output"][0]
    assert item["summary"] == [{"type": "summary_text", "text": "one two"}]
    assert item["content"] == []


def test_a_custom_tool_gets_plain_text() -> None:
    text = '*** Begin\n"quoted" \\ tab\t é 😀\n*** End'
    arguments = json.dumps({"input": text})
    script = [ToolCallDelta(0, 0, "call_a", "patch"), *(ToolCallDelta(0, 0, arguments=c) for c in arguments), STOP]
    events = written(script)
    assert joined(events, "custom_tool_call_input") == text
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "patch", text)
    assert kinds(events)[-3:] == ["custom_tool_call_input.done", "output_item.done", "completed"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a\\nb', "a\nb"),
        ('{"input": "a\\u00', "a"),
        ('{"input": "a"', "a"),
        ('{"input": ""}', ""),
        ("plain text", "plain text"),
        ('{"other": 1}', '{"other": 1}'),
        ('{"input": {"a": 1}}', '{"a": 1}'),
        ('{"input": "a", "more": 1}', 'a", "more": 1}'),
        ("", ""),
    ],
)
def test_text_of_a_custom_tool_survives_wrong_arguments(arguments: str, text: str) -> None:
    for size in (1, 3, 100):
        reader = FreeformReader()
        pieces = [reader.more(arguments[i : i + size]) for i in range(0, len(arguments), size)]
        assert "".join([*pieces, reader.rest()]) == text == reader.text


def test_an_answer_that_was_cut_off_is_incomplete() -> None:
    events = written([TextDelta(0, "a"), ToolCallDelta(0, 0, "c", "f", '{"a'), CUT])
    last = events[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in last["response"]["output"]] == ["completed", "incomplete"]


def test_white_space_between_items_begins_no_message() -> None:
    events = written([ReasoningDelta(0, "hm"), TextDelta(0, "\n\n"), ToolCallDelta(0, 0, "c", "f", "{}"), STOP])
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "function_call"]
    kept = written([TextDelta(0, "\n"), TextDelta(0, " a"), TextDelta(0, "\n"), STOP])
    assert joined(kept, "output_text") == "\n a\n"


def test_an_empty_answer_is_an_empty_message() -> None:
    events = written([STOP])
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")
    assert "output_text.delta" not in kinds(events)


def test_a_failed_response_keeps_what_was_written() -> None:
    encoder = encoder_of()
    list(encoder.opening())
    list(encoder.chunks(TextDelta(0, "half")))
    events = list(encoder.failing(EngineFailure("gone")))
    assert [event.kind for event in events][-2:] == ["response.output_item.done", "response.failed"]
    assert encoder.answer.status == "failed"
    assert encoder.answer.error is not None
    assert (encoder.answer.error.code, encoder.answer.error.message) == ("server_error", "gone")
    assert encoder.answer.output[0].status == "incomplete"


# ---- and back ----


def replayed(script: Sequence[Event], **options: Any) -> list[ResolvedItem]:
    return read_items(written(script, **options)[-1]["response"]["output"])


@pytest.mark.parametrize("has_summary", [False, True])
def test_what_comes_back_is_one_turn_of_the_assistant(has_summary: bool) -> None:
    script = [
        ReasoningDelta(0, "hm"),
        TextDelta(0, "So:"),
        ToolCallDelta(0, 0, "call_a", "space__g", "{}"),
        ToolCallDelta(0, 1, "call_b", "patch", '{"input": "x"}'),
        STOP,
    ]
    items = replayed(script, has_summary=has_summary, seal=SEALER.seal)
    (message,) = messages_of(items, instructions=None, unseal=SEALER.unseal)
    assert message.reasoning == "hm"
    assert [part.text for part in message.content or () if not isinstance(part, str)] == ["So:"]
    assert message.tool_calls == (
        ToolCall("call_a", "space__g", "{}"),
        ToolCall("call_b", "patch", '{"input": "x"}'),
    )


def test_sealed_reasoning_is_taken_back_unchanged_only() -> None:
    blob = SEALER.seal("hm é")
    assert SEALER.unseal(blob) == "hm é"
    item: dict[str, Any] = {"type": "reasoning", "summary": [], "encrypted_content": blob}
    assert messages_of(read_items([item]), instructions=None, unseal=SEALER.unseal)[0].reasoning == "hm é"
    for wrong in (blob[:-6] + "AAAAAA", blob[4:], "", "vr1.x", "é", Sealer(b"x" * 32).seal("hm")):
        with pytest.raises(InvalidRequest) as caught:
            SEALER.unseal(wrong)
        assert caught.value.code == "invalid_encrypted_content"


def test_turns_are_told_apart() -> None:
    items = read_items(
        [
            {"type": "message", "role": "developer", "content": "a"},
            {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "b"}]},
            {"type": "message", "role": "user", "content": "c"},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "r"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
            {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}"},
            {"type": "custom_tool_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "s"}]},
            {"type": "message", "role": "assistant", "content": "d"},
            {"type": "message", "role": "assistant", "content": "e"},
        ]
    )
    messages = messages_of(items, instructions="i", unseal=str)
    assert [message.role for message in messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
        "assistant",
    ]
    assert messages[0].content == "i\n\na\n\nb"
    assert messages[4].reasoning == "t"
    assert messages[5].tool_call_id == "2"
