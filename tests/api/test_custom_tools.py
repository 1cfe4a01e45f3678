"""Custom tools through POST /v1/chat/completions: a plain text instead of arguments, whole, streamed and in history."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest
import tokenizers

from tests.api.test_tools import Says, ask, refusal, stream

pytestmark = pytest.mark.anyio

FREE = {"type": "custom", "custom": {"name": "patch", "description": "Changes files."}}
FUNCTION = {"type": "function", "function": {"name": "look"}}
TEXT = 'a = "1"\n\\d </x> é😀'
CALL = f"<tool_call>\n{json.dumps({'name': 'patch', 'arguments': {'input': TEXT}})}\n</tool_call>"
LOOK = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


def with_format(syntax: str, definition: str) -> dict[str, Any]:
    grammar = {"syntax": syntax, "definition": definition}
    return {"type": "custom", "custom": {"name": "patch", "format": {"type": "grammar", "grammar": grammar}}}


@pytest.fixture(scope="module")
def says(backend: tokenizers.Tokenizer) -> Says:
    return Says(backend)


@pytest.fixture(scope="module")
def runner_options(backend: tokenizers.Tokenizer, says: Says) -> dict[str, Any]:
    return {"script": says, "vocab_size": backend.get_vocab_size(), "max_model_len": 4096}


async def test_call_has_the_text_alone(client: httpx.AsyncClient, says: Says) -> None:
    choice = await ask(client, says, f"{CALL}\n{LOOK}", tools=[FREE, FUNCTION])
    assert choice["finish_reason"] == "tool_calls"
    custom, function = choice["message"]["tool_calls"]
    assert custom.keys() == {"id", "type", "custom"}
    assert custom["type"] == "custom"
    assert custom["custom"] == {"name": "patch", "input": TEXT}
    assert function.keys() == {"id", "type", "function"}


async def test_text_is_streamed_as_it_comes(client: httpx.AsyncClient, says: Says) -> None:
    choices = await stream(client, says, f"{CALL}\n{LOOK}\n{CALL}", tools=[FREE, FUNCTION])
    pieces = [piece for choice in choices for piece in choice["delta"].get("tool_calls", [])]
    for index in (0, 2):
        first, *rest = [piece for piece in pieces if piece["index"] == index]
        assert first["type"] == "custom"
        assert first["id"].startswith("call_")
        assert first["custom"] == {"name": "patch", "input": ""}
        assert len(rest) > 1
        assert all(piece.keys() == {"index", "custom"} and piece["custom"].keys() == {"input"} for piece in rest)
        assert "".join(piece["custom"]["input"] for piece in rest) == TEXT
    assert [piece["type"] for piece in pieces if "type" in piece] == ["custom", "function", "custom"]
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("syntax", "definition", "pattern"),
    [
        ("lark", 'start: "<<" line{1,2} ">>"\nline: /[ab]{1,3}/ "\\n"', r"<<([ab]{1,3}\n){1,2}>>"),
        ("regex", r"[ab]{2,3}\n", r"[ab]{2,3}\n"),
    ],
)
@pytest.mark.parametrize("choice", ["required", {"type": "custom", "custom": {"name": "patch"}}])
async def test_text_follows_its_grammar_whatever_the_model_wants(
    client: httpx.AsyncClient, says: Says, syntax: str, definition: str, pattern: str, choice: Any
) -> None:
    tools = [with_format(syntax, definition)]
    found = await ask(client, says, "no", tools=tools, tool_choice=choice, parallel_tool_calls=False)
    [call] = found["message"]["tool_calls"]
    assert re.fullmatch(pattern, call["custom"]["input"])


async def test_the_model_is_told_of_the_grammar_and_of_earlier_calls(client: httpx.AsyncClient, says: Says) -> None:
    called = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "one two"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    await ask(client, says, "well", messages=messages, tools=[with_format("regex", "one.*")])
    assert "The input must match this regular expression" in says.prompts[-1]
    assert '{"name": "patch", "arguments": {"input": "one two"}}' in says.prompts[-1]


async def test_official_client_takes_custom_calls(client: httpx.AsyncClient, says: Says) -> None:
    says.text = CALL
    sdk = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client)
    answer = await sdk.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "hi"}], tools=[FREE], temperature=0, max_tokens=400
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "custom"
    assert call.custom.input == TEXT


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.custom.name"),
        ({"tools": [FREE, FREE]}, "tools.1.custom.name"),
        ({"tools": [with_format("ebnf", "x")]}, "tools.0.custom.format.grammar.syntax"),
        ({"tools": [with_format("lark", "start: (")]}, "tools.0.custom.format.grammar.definition"),
        ({"tools": [FREE], "tool_choice": {"type": "function", "function": {"name": "patch"}}}, "tool_choice"),
        ({"tools": [FREE], "tool_choice": {"type": "custom", "custom": {"name": "other"}}}, "tool_choice"),
    ],
)
async def test_refusal_names_the_field(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert (await refusal(client, **fields))[0] == param
