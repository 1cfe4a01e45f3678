"""Turns of the system in the middle of a conversation: tools that come and go, effort, and text for one turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_mlx.api.wire.anthropic.body import MessagesBody
from vllm_mlx.api.wire.anthropic.request import message_request
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.core.chat import ChatRequest, Message
from vllm_mlx.core.errors import InvalidRequest

EMPTY = {"type": "object", "properties": {}}
LOOK = {"name": "look", "description": "Looks.", "input_schema": EMPTY}
DIG = {"name": "dig", "description": "Digs a hole.", "input_schema": EMPTY}
USER = {"role": "user", "content": "hello"}
NAMED_LOOK = {"type": "tool_reference", "name": "look"}
DEFINED_DIG = {"type": "tool_definition", "definition": DIG}
REMOVAL = {"type": "tool_removal", "tool": NAMED_LOOK}
ADDITION = {"type": "tool_addition", "tool": DEFINED_DIG}


def request(*messages: Any, **fields: Any) -> ChatRequest:
    body = {"messages": [USER, *messages], "tools": [LOOK], "max_tokens": 9, **fields}
    return message_request(
        decode(json.dumps(body).encode(), MessagesBody), request_id="r", defaults={}, unseal=lambda _: None
    )


def system(*blocks: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "system", "content": list(blocks), **fields}


def text_of(message: Message) -> str:
    content = message.content or ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def test_tool_that_is_defined_later_is_shown_there() -> None:
    found = request(system(ADDITION))
    assert [(tool.name, tool.is_listed) for tool in found.tools] == [("look", True), ("dig", False)]
    assert [message.role for message in found.messages] == ["user", "system"]
    assert '"description": "Digs a hole."' in text_of(found.messages[1])


def test_changes_in_a_row_are_one_text() -> None:
    later = {"type": "tool_definition", "definition": {**DIG, "name": "dig_deep"}}
    marked = {**ADDITION, "cache_control": {"type": "ephemeral"}}
    found = request(system(REMOVAL, {"type": "tool_addition", "tool": later}, marked))
    told = text_of(found.messages[1])
    assert told.count("<tools>") == 1
    assert told.startswith("These tools cannot be called any more: look.")
    assert found.messages[1].keep_s == 300
    assert found.tools[0].is_listed, "the beginning of the prompt stays as it was"


def test_removed_tool_is_not_forced() -> None:
    choice = {"type": "tool", "name": "look"}
    with pytest.raises(InvalidRequest, match="removed"):
        request(system(REMOVAL), tool_choice=choice)
    back = {"type": "tool_addition", "tool": NAMED_LOOK}
    assert request(system(REMOVAL), system(back), tool_choice=choice).tool_choice.names == ("look",)
    assert request(system(REMOVAL, ADDITION), tool_choice={"type": "any"}).tool_choice.names == ("dig",)
    with pytest.raises(InvalidRequest, match="there are no tools"):
        request(system(REMOVAL), tool_choice={"type": "any"})


def test_later_definition_counts() -> None:
    schema = {"type": "object", "properties": {"far": {"type": "boolean"}}}
    changed = {"type": "tool_definition", "definition": {**LOOK, "input_schema": schema}}
    (tool,) = request(system({"type": "tool_addition", "tool": changed})).tools
    assert (tool.parameters, tool.is_listed) == (schema, True)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            system({"type": "tool_removal", "tool": {"type": "tool_reference", "name": "x"}}),
            r"messages\.1\.content\.0\.tool\.name is 'x', which is not among the tools",
        ),
        ({"role": "user", "content": [ADDITION]}, "a turn of the user has no blocks of type 'tool_addition'"),
        (system({"type": "tool_addition", "tool": {"type": "mcp_toolset_reference"}}), "calls no MCP servers"),
        ({**USER, "output_config": {"effort": "low"}}, r"messages\.1\.output_config: only turns of the system"),
        ({**USER, "clear_at": "never"}, r"messages\.1\.clear_at: only turns of the system"),
        ({"role": "user"}, r"messages\.1\.content is missing"),
        ({"role": "system", "output_config": {}}, r"messages\.1\.content is missing"),
        (system(output_config={"format": None}), r"messages\.1\.output_config\.format"),
    ],
)
def test_what_cannot_be_is_refused_by_its_place(turn: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        request(turn)


def test_effort_of_the_last_turn_counts() -> None:
    low, high = ({"role": "system", "output_config": {"effort": effort}} for effort in ("low", "high"))
    assert request(low, USER, high).template_kwargs["reasoning_effort"] == "high"
    found = request(low, USER, output_config={"effort": "max"})
    assert found.template_kwargs["reasoning_effort"] == "low"
    assert [message.role for message in found.messages] == ["user"]
    assert request(output_config={"effort": "max"}).template_kwargs["reasoning_effort"] == "max"


def test_text_for_one_turn_is_taken_out_when_it_is_over() -> None:
    note = system({"type": "text", "text": "Be quick."}, REMOVAL, clear_at="next_user_message")
    assert text_of(request(note).messages[1]).startswith("Be quick.")
    over = request(note, {"role": "assistant", "content": "ok"}, USER)
    assert "Be quick." not in "".join(map(text_of, over.messages))
    assert "any more: look" in text_of(over.messages[1])
    kept = request({**note, "clear_at": "never"}, USER)
    assert text_of(kept.messages[1]).startswith("Be quick.")
