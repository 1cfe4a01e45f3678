"""Tools as text, for templates that know none."""

from __future__ import annotations

import json

from vllm_mlx.chat.plain_tools import calls_as_text, parameters_of, tool_variables, with_tools_as_text
from vllm_mlx.core.chat import Message, TextPart, Tool, ToolCall

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
WEATHER = Tool("weather", "Looks.", SCHEMA)


def test_tools_have_openais_shape_and_always_the_same_order() -> None:
    (shown,) = tool_variables([WEATHER])
    assert list(shown) == ["type", "function"]
    assert list(shown["function"]) == ["name", "description", "parameters"]
    assert list(shown["function"]["parameters"]["properties"]) == ["b", "a"]


def test_freeform_tool_is_shown_with_one_text_argument() -> None:
    assert parameters_of(Tool("patch", is_freeform=True))["required"] == ["input"]


def test_system_text_lists_the_tools_behind_the_conversations_own() -> None:
    messages = (Message("system", (TextPart("Be"), TextPart("brief."))), Message("user", "hi"))
    first, second = with_tools_as_text(messages, [WEATHER, Tool("clock")])
    assert str(first.content).startswith("Be\nbrief.\n\n")
    listed = str(first.content).split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    assert [json.loads(line)["function"]["name"] for line in listed] == ["weather", "clock"]
    assert second == messages[1]


def test_conversation_without_system_text_gets_one() -> None:
    assert [m.role for m in with_tools_as_text([Message("user", "hi")], [WEATHER])] == ["system", "user"]


def test_calls_and_results_become_text() -> None:
    calls = (ToolCall("1", "weather", '{"a": 1}'), ToolCall("2", "weather", "broken"))
    messages = [
        Message("user", "hi"),
        Message("assistant", "I look.", tool_calls=calls),
        Message("tool", "rain", tool_call_id="1"),
        Message("tool", (TextPart("sun"),), tool_call_id="2", is_breakpoint=True),
        Message("assistant", "Both."),
    ]
    plain = calls_as_text(messages)
    assert [message.role for message in plain] == ["user", "assistant", "user", "assistant"]
    assert plain[1].tool_calls == ()
    assert str(plain[1].content).startswith('I look.\n<tool_call>\n{"name": "weather", "arguments": {"a": 1}}')
    assert '"arguments": "broken"' in str(plain[1].content)
    assert plain[2].content == ("<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>")
    assert plain[2].is_breakpoint
