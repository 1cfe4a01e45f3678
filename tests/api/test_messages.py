"""POST /v1/messages over a fake model that writes what a real one would."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anthropic.types
import httpx
import pydantic
import pypdf
import pytest
import tokenizers
from fixtures_says import THINKING, Says
from fixtures_server import LiveServer, client_of, running
from fixtures_text import write_tokenizer

from vllm_mlx.chat.service import ChatService
from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio
PATH = "/v1/messages"
ASK = [{"role": "user", "content": "weather in Paris"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Looks.", "input_schema": SCHEMA}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(anthropic.types.RawMessageStreamEvent)


@pytest.fixture(scope="module")
def says(backend: tokenizers.Tokenizer) -> Says:
    return Says(backend)


@pytest.fixture(scope="module")
def runner_options(backend: tokenizers.Tokenizer, says: Says) -> dict[str, Any]:
    return {"script": says, "vocab_size": backend.get_vocab_size(), "max_model_len": 2048}


@pytest.fixture(scope="module")
def config() -> Config:
    return Config(model="/models/fake", served_model_name="org/fake-model", engine="thread", api_key="sk-secret")


@pytest.fixture(scope="module")
async def client(
    tmp_path_factory: pytest.TempPathFactory, config: Config, runner_options: dict[str, Any]
) -> AsyncIterator[httpx.AsyncClient]:
    """A model whose template knows tools and opens reasoning unless that is disabled."""
    folder: Path = tmp_path_factory.mktemp("thinker")
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(THINKING)
    async with running(folder, config, **runner_options) as parts, client_of(parts.app) as found:
        found.headers = httpx.Headers({"x-api-key": "sk-secret", "anthropic-version": "2023-06-01"})
        yield found


async def ask(client: httpx.AsyncClient, says: Says, text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A whole message; reasoning is disabled unless the fields say otherwise."""
    says.text = text
    sent = {"messages": ASK, "max_tokens": 200, "temperature": 0, "thinking": {"type": "disabled"}, **fields}
    answer = await client.post(PATH, json=sent)
    assert answer.status_code == 200, answer.text
    anthropic.types.Message.model_validate(answer.json())
    return dict(answer.json())


async def stream(client: httpx.AsyncClient, says: Says, text: str = "hello", **fields: Any) -> list[dict[str, Any]]:
    """All events of a stream, each valid by the SDK's types."""
    says.text = text
    sent = {"messages": ASK, "max_tokens": 200, "temperature": 0, "thinking": {"type": "disabled"}, **fields}
    answer = await client.post(f"{PATH}?beta=true", json={**sent, "stream": True})
    assert answer.status_code == 200, answer.text
    frames = [frame.split("\n") for frame in answer.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name.removeprefix("event: ") for name, _ in frames] == [event["type"] for event in events]
    for event in events:
        if event["type"] not in ("ping", "error"):
            EVENT.validate_python(event)
    return events


async def refusal(client: httpx.AsyncClient, status: int = 400, **fields: Any) -> str:
    answer = await client.post(PATH, json={"messages": ASK, "max_tokens": 8, **fields})
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["type"] == "error"
    assert body["request_id"] == answer.headers["request-id"]
    return str(body["error"]["message"])


def prompt_tokens(usage: dict[str, Any]) -> int:
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return sum(usage[name] for name in names)


async def test_message_has_anthropics_shape(client: httpx.AsyncClient, says: Says) -> None:
    message = await ask(client, says, "hello")
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "org/fake-model")
    assert message["content"] == [{"type": "text", "text": "hello"}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    assert message["usage"]["output_tokens"] > 1
    assert message["usage"]["service_tier"] == "standard"


async def test_stream_adds_up_to_the_message(client: httpx.AsyncClient, says: Says) -> None:
    text, fields = f"<think>why</think>Let me look.\n{CALL}", {"tools": [TOOL], "thinking": {"type": "adaptive"}}
    whole = await ask(client, says, text.removeprefix("<think>"), **fields)
    events = await stream(client, says, text.removeprefix("<think>"), **fields)
    kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    assert kinds == ["message_start", "ping", *block, *block, *block, "message_delta", "message_stop"]
    assert events[0]["message"]["content"] == []
    blocks: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event["type"] == "content_block_delta":
            blocks.setdefault(event["index"], []).append(event["delta"])
    assert "".join(delta.get("thinking", "") for delta in blocks[0]) == whole["content"][0]["thinking"] == "why"
    assert blocks[0][-1] == {"type": "signature_delta", "signature": whole["content"][0]["signature"]}
    assert "".join(delta["text"] for delta in blocks[1]) == whole["content"][1]["text"] == "Let me look.\n"
    assert json.loads("".join(delta["partial_json"] for delta in blocks[2])) == {"city": "Paris"}
    assert whole["content"][2] == {**whole["content"][2], "type": "tool_use", "name": "weather"}
    assert whole["content"][2]["input"] == {"city": "Paris"}
    assert whole["content"][2]["id"].startswith("toolu_")
    start = next(event for event in events if event.get("index") == 2)
    assert start["content_block"]["input"] == {}
    delta = next(event for event in events if event["type"] == "message_delta")
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert delta["usage"]["output_tokens_details"]["thinking_tokens"] > 0


async def test_prompt_is_counted_in_the_first_event(client: httpx.AsyncClient, says: Says) -> None:
    system = "count " * 100
    first = await ask(client, says, system=system)
    events = await stream(client, says, system=system)
    usage = events[0]["message"]["usage"]
    assert prompt_tokens(usage) == prompt_tokens(first["usage"]) > 100
    assert usage["cache_read_input_tokens"] >= 64
    counted = await client.post(f"{PATH}/count_tokens", json={"messages": ASK, "system": system})
    with_thinking = await ask(client, says, "why</think>so", system=system, thinking={"type": "adaptive"})
    assert counted.json() == {"input_tokens": prompt_tokens(with_thinking["usage"])}


async def test_same_prompt_is_counted_once(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"messages": ASK, "system": "once"}
    first = await client.post(f"{PATH}/count_tokens", json=asked)

    async def fail(*_: object) -> int:
        raise AssertionError("counted again")

    monkeypatch.setattr(ChatService, "count_tokens", fail)
    again = await client.post(f"{PATH}/count_tokens", json=asked)
    assert again.json() == first.json()
    assert first.status_code == again.status_code == 200


async def test_stop_sequence_is_named(client: httpx.AsyncClient, says: Says) -> None:
    message = await ask(client, says, "one two three", stop_sequences=["nine", "two"])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "two")
    assert message["content"][0]["text"] == "one "


async def test_cut_answers_say_what_cut_them(client: httpx.AsyncClient, says: Says) -> None:
    short = await ask(client, says, "one two three", max_tokens=2)
    assert (short["stop_reason"], short["usage"]["output_tokens"]) == ("max_tokens", 2)
    full = await ask(client, says, "two " * 300, system="count " * 1900, max_tokens=30000)
    assert full["stop_reason"] == "model_context_window_exceeded"
    assert prompt_tokens(full["usage"]) + full["usage"]["output_tokens"] == 2048


async def test_prompt_that_is_too_long_is_known_by_its_text(client: httpx.AsyncClient) -> None:
    message = await refusal(client, system="count " * 3000)
    assert message.startswith("prompt is too long: ")
    num_tokens, maximum = (int(word) for word in message.split() if word.isdigit())
    assert num_tokens > 3000
    assert maximum == 2047


async def test_whole_conversation_reaches_the_template(client: httpx.AsyncClient, says: Says) -> None:
    await ask(
        client,
        says,
        system=[{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        messages=[
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hmm", "signature": "abc"},
                    {"type": "redacted_thinking", "data": "xx"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": "no such city"},
                    {"type": "text", "text": "go on"},
                    {
                        "type": "document",
                        "title": "Notes",
                        "source": {"type": "text", "media_type": "text/plain", "data": "rain"},
                    },
                ],
            },
            {"role": "user", "content": "quickly"},
        ],
    )
    prompt = says.prompts[-1]
    assert prompt.startswith("<|im_start|>system\nBe brief.\nBe kind.<|im_end|>\n<|im_start|>user\nweather?<|im_end|>")
    assert '<think>hmm</think>I look.<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}' in prompt
    assert "<|im_start|>tool\nError: no such city<|im_end|>" in prompt
    assert "user\ngo on\n<document>\nNotes\nrain\n</document>\nquickly<|im_end|>" in prompt


async def test_answer_goes_on_with_the_assistants_turn(client: httpx.AsyncClient, says: Says) -> None:
    message = await ask(client, says, " three", messages=[*ASK, {"role": "assistant", "content": "one two"}])
    assert says.prompts[-1].endswith("assistant\none two")
    assert message["content"][0]["text"] == " three"


@pytest.mark.parametrize("content", ["", " \n", [], [{"type": "text", "text": ""}]])
async def test_empty_turn_of_the_assistant_at_the_end_is_no_beginning(
    client: httpx.AsyncClient, says: Says, content: Any
) -> None:
    message = await ask(client, says, "hello", messages=[*ASK, {"role": "assistant", "content": content}])
    assert message["content"][0]["text"] == "hello"
    assert says.prompts[-1].count("assistant") == 1


async def test_reasoning_that_is_left_out_comes_back_sealed(client: httpx.AsyncClient, says: Says) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    message = await ask(client, says, "river</think>Seine", thinking=thinking)
    assert message["content"][0]["thinking"] == ""
    again = [*ASK, {"role": "assistant", "content": message["content"]}, {"role": "user", "content": "more"}]
    await ask(client, says, messages=again)
    assert "<think>river</think>Seine" in says.prompts[-1]


async def test_reasoning_ends_with_its_budget(client: httpx.AsyncClient, says: Says) -> None:
    thinking = {"type": "enabled", "budget_tokens": 4}
    message = await ask(client, says, "river " * 50, thinking=thinking, max_tokens=400)
    assert message["content"][0]["thinking"].count("river") <= 4
    assert message["content"][1]["type"] == "text"


async def test_disabled_reasoning_is_not_shown(client: httpx.AsyncClient, says: Says) -> None:
    message = await ask(client, says, "<think>river</think>Seine", max_tokens=400)
    assert [block["type"] for block in message["content"]] == ["text"]


async def test_tool_choice_none_hides_the_tools(client: httpx.AsyncClient, says: Says) -> None:
    await ask(client, says, tools=[TOOL], tool_choice={"type": "none"})
    assert "Looks." not in says.prompts[-1]
    await ask(client, says, tools=[TOOL], tool_choice={"type": "auto"})
    assert "Looks." in says.prompts[-1]


async def test_one_call_is_all_if_calls_may_not_be_parallel(client: httpx.AsyncClient, says: Says) -> None:
    fields = {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    message = await ask(client, says, CALL + "\n" + CALL, **fields)
    assert [block["type"] for block in message["content"]] == ["tool_use"]
    assert message["stop_reason"] == "tool_use"


async def test_a_call_that_must_come_comes(client: httpx.AsyncClient, says: Says) -> None:
    city = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        tools = [{**TOOL, "input_schema": city}]
        message = await ask(client, says, "I would rather not", tools=tools, tool_choice=choice, max_tokens=400)
        assert message["content"][0]["input"]["city"] in ("Paris", "Rome")


async def test_anthropics_own_client_tools_are_offered_as_functions(client: httpx.AsyncClient, says: Says) -> None:
    tools = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
    ]
    await ask(client, says, tools=tools)
    assert '"restart"' in says.prompts[-1]
    assert '"old_str"' in says.prompts[-1]


async def test_answer_has_the_shape_that_was_asked_for(client: httpx.AsyncClient, says: Says) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    for fields in (
        {"output_config": {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}},
        {"output_format": {"type": "json_schema", "schema": schema}},
    ):
        message = await ask(client, says, '{"ok": true}', **fields)
        assert json.loads(message["content"][0]["text"]) == {"ok": True}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "clock"}}, "tool_choice.name"),
        ({"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"messages": [*ASK, {"role": "assistant", "content": "{"}],
          "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}, "output_config.format"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "foo": 1}]}]},
         "messages.0.content.0.foo"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages.0.content.0.text"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management.edits.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "n", "input": {}}]}]},
         "messages"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
         "messages.0.content.0"),
    ],
)  # fmt: skip
async def test_refusal_names_the_field(client: httpx.AsyncClient, fields: dict[str, Any], name: str) -> None:
    assert name in await refusal(client, **fields)


async def test_client_is_told_that_it_can_do_without_a_thread(client: httpx.AsyncClient) -> None:
    """By these details Anthropic's own tool runner knows that it must send all messages itself."""
    answer = await client.post(PATH, json={"messages": ASK, "max_tokens": 4, "thread": {"type": "create"}})
    error = answer.json()["error"]
    assert (answer.status_code, error["details"]["error_code"]) == (400, "thread_unsupported_request")
    assert "details" not in (await client.post(PATH, json={"messages": []})).json()["error"]


async def test_very_many_blocks_are_read_in_one_pass(client: httpx.AsyncClient) -> None:
    """A hundred thousand: copying what was read for each of them would take minutes, in which nobody is answered."""
    texts = {"role": "user", "content": [{"type": "text", "text": "a"}] * 100_000}
    calls = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "n", "input": {}}] * 50_000}
    for turns in ([texts], [calls, *ASK]):
        answer = await client.post(PATH, json={"messages": turns, "max_tokens": 4})
        assert "prompt is too long" in answer.text


async def test_image_in_a_result_is_refused_by_its_place(client: httpx.AsyncClient) -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {}}]}
    message = await refusal(client, messages=[{"role": "user", "content": [result]}])
    assert message.startswith("messages.0.content.0.content.0 is an image")


async def test_errors_have_anthropics_types(client: httpx.AsyncClient) -> None:
    answers = [
        (await client.post(PATH, content=b'{"model": '), 400, "invalid_request_error"),
        (await client.post(PATH, json={"messages": ASK}), 400, "invalid_request_error"),
        (await client.post(PATH, json={"model": "x", "messages": ASK, "max_tokens": 1}), 404, "not_found_error"),
        (await client.post(PATH, json={}, headers={"x-api-key": "wrong"}), 401, "authentication_error"),
        (await client.get(PATH), 405, "invalid_request_error"),
        (await client.get(f"{PATH}/nothing/here"), 404, "not_found_error"),
    ]
    for answer, status, kind in answers:
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)


async def test_either_key_header_is_enough(client: httpx.AsyncClient) -> None:
    bearer = {"authorization": "Bearer sk-secret", "x-api-key": "", "anthropic-beta": "a,b"}
    answer = await client.post(f"{PATH}/count_tokens", json={"messages": ASK, "tools": []}, headers=bearer)
    assert answer.status_code == 200
    assert "request-id" in answer.headers


async def test_models_are_shown_in_the_dialect_of_the_client(client: httpx.AsyncClient) -> None:
    page = (await client.get("/v1/models?limit=5")).json()
    (model,) = page["data"]
    anthropic.types.ModelInfo.model_validate(model)
    assert (page["first_id"], page["has_more"]) == (model["id"], False)
    assert (model["id"], model["max_input_tokens"]) == ("org/fake-model", 2048)
    assert (await client.get("/v1/models/org/fake-model")).json() == model
    assert (await client.get("/v1/models/nope")).json()["error"]["type"] == "not_found_error"
    del client.headers["anthropic-version"]
    try:
        assert (await client.get("/v1/models")).json()["object"] == "list"
    finally:
        client.headers["anthropic-version"] = "2023-06-01"


async def test_root_answers_head(client: httpx.AsyncClient) -> None:
    assert (await client.head("/")).status_code == 200


def history(num_calls: int) -> list[dict[str, Any]]:
    """A question, and calls with reasoning and results."""
    turns: list[dict[str, Any]] = list(ASK)
    for number in range(num_calls):
        call = {"type": "tool_use", "id": f"t{number}", "name": "weather", "input": {"city": f"c{number}"}}
        thought = {"type": "thinking", "thinking": f"thought{number}", "signature": ""}
        result = {"type": "tool_result", "tool_use_id": f"t{number}", "content": f"result{number}"}
        turns += [{"role": "assistant", "content": [thought, call]}, {"role": "user", "content": [result]}]
    return turns


async def test_old_results_are_taken_out(client: httpx.AsyncClient, says: Says) -> None:
    edit = {
        "type": "clear_tool_uses_20250919",
        "trigger": {"type": "tool_uses", "value": 3},
        "keep": {"type": "tool_uses", "value": 1},
        "clear_tool_inputs": True,
    }
    fields = {"messages": history(4), "context_management": {"edits": [edit]}}
    message = await ask(client, says, **fields)
    prompt = says.prompts[-1]
    assert "result2" not in prompt
    assert "c2" not in prompt
    assert "result3" in prompt
    [applied] = message["context_management"]["applied_edits"]
    assert applied["cleared_tool_uses"] == 3
    counted = await client.post(f"{PATH}/count_tokens", json=fields)
    original = counted.json()["context_management"]["original_input_tokens"]
    assert original == counted.json()["input_tokens"] + applied["cleared_input_tokens"]
    edit["exclude_tools"] = ["weather"]
    message = await ask(client, says, messages=history(4), context_management={"edits": [edit]})
    assert message["context_management"] == {"applied_edits": []}
    assert "result0" in says.prompts[-1]


async def test_old_reasoning_is_taken_out(client: httpx.AsyncClient, says: Says) -> None:
    turns = [*history(1), {"role": "assistant", "content": "rain"}, *history(1)[:1], *history(2)[3:]]
    edit: dict[str, Any] = {"type": "clear_thinking_20251015"}
    message = await ask(client, says, messages=turns, context_management={"edits": [edit]})
    assert "thought0" not in says.prompts[-1]
    assert "thought1" in says.prompts[-1]
    assert message["context_management"]["applied_edits"][0]["cleared_thinking_turns"] == 1
    for keep in ("all", {"type": "thinking_turns", "value": 2}):
        await ask(client, says, messages=turns, context_management={"edits": [{**edit, "keep": keep}]})
        assert "thought0" in says.prompts[-1]


async def test_marked_beginnings_are_counted_once_as_written_and_then_as_read(
    client: httpx.AsyncClient, says: Says
) -> None:
    mark = {"type": "ephemeral"}
    system = [{"type": "text", "text": "river " * 120, "cache_control": {**mark, "ttl": "1h"}}]
    last = {"type": "text", "text": "forest " * 60, "cache_control": mark}
    fields = {"system": system, "messages": [{"role": "user", "content": [last]}]}
    first = (await ask(client, says, **fields))["usage"]
    assert first["cache_read_input_tokens"] < 32
    created = first["cache_creation"]
    assert created["ephemeral_1h_input_tokens"] > 120
    assert created["ephemeral_5m_input_tokens"] > 60
    assert first["cache_creation_input_tokens"] == sum(created.values())
    assert 0 < first["input_tokens"] < 10  # the beginning of the answer
    second = (await ask(client, says, **fields))["usage"]
    assert second["cache_creation_input_tokens"] < 32
    assert prompt_tokens(second) == prompt_tokens(first)
    again = [*fields["messages"], {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}]
    unmarked = (await ask(client, says, system=system, messages=again, cache_control=mark))["usage"]
    assert unmarked["cache_read_input_tokens"] >= second["cache_read_input_tokens"] - 32
    assert unmarked["cache_creation"]["ephemeral_5m_input_tokens"] > 0


async def test_a_stream_tells_at_its_end_what_is_kept_of_the_prompt(client: httpx.AsyncClient, says: Says) -> None:
    last = {"type": "text", "text": "meadow " * 60, "cache_control": {"type": "ephemeral"}}
    events = await stream(client, says, "hello", messages=[{"role": "user", "content": [last]}])
    start, end = events[0]["message"]["usage"], events[-2]["usage"]
    assert (start["cache_creation_input_tokens"], start["input_tokens"] > 60) == (0, True)
    assert end["cache_creation_input_tokens"] > 60
    assert prompt_tokens(start) == prompt_tokens(end)


async def test_mark_on_a_tool_counts_at_the_end_of_the_system_text(client: httpx.AsyncClient, says: Says) -> None:
    tool = {**TOOL, "description": "Looks at the sky of a town.", "cache_control": {"type": "ephemeral"}}
    usage = (await ask(client, says, system="Look out.", tools=[tool]))["usage"]
    assert usage["cache_creation_input_tokens"] > 40
    assert usage["input_tokens"] > 5


async def test_diagnostics_say_what_changed(client: httpx.AsyncClient, says: Says) -> None:
    diagnostics = {"previous_message_id": None}
    await ask(client, says, system="Tell of lakes. " * 20)
    message = await ask(client, says, system="Tell of seas. " * 20, diagnostics=diagnostics)
    assert message["diagnostics"]["cache_miss_reason"]["type"] == "system_changed"
    assert message["diagnostics"]["cache_miss_reason"]["cache_missed_input_tokens"] > 20


async def test_pdf_file_that_cannot_be_read_is_refused_by_its_place(client: httpx.AsyncClient, says: Says) -> None:
    writer, out = pypdf.PdfWriter(), io.BytesIO()
    writer.add_blank_page(100, 100)
    writer.write(out)
    source = {"type": "base64", "media_type": "application/pdf", "data": base64.b64encode(out.getvalue()).decode()}
    document = {"type": "document", "source": source}
    assert "has no text" in await refusal(client, messages=[{"role": "user", "content": [document]}])
    result = {"type": "tool_result", "tool_use_id": "t", "content": [document]}
    message = await refusal(client, messages=[{"role": "user", "content": [result]}])
    assert message.startswith("messages.0.content.0.content.0.source: ")
    document["source"] = {**source, "data": "?"}
    assert "source.data is not base64" in await refusal(client, messages=[{"role": "user", "content": [document]}])


def test_silent_stream_pings_and_one_that_fails_ends_with_the_error(serve: Callable[..., LiveServer]) -> None:
    server = serve(Config(model="/models/fake", engine="thread", keepalive_interval=0.05), step_s=0.4)
    sent = {"messages": ASK, "max_tokens": 100, "stream": True, "timeout": 1.5}
    answer = httpx.post(f"{server.url}{PATH}", json=sent, timeout=30)
    assert answer.status_code == 200
    first, *rest = answer.text.strip().split("\n\n")
    assert first == ": keep-alive"
    frames = [frame.split("\n") for frame in rest if not frame.startswith(":")]
    kinds = [name.removeprefix("event: ") for name, _ in frames]
    assert (kinds[0], kinds[-1]) == ("message_start", "error")
    assert kinds.count("ping") > 1
    error = json.loads(frames[-1][1].removeprefix("data: "))
    assert error["error"]["type"] == "timeout_error"
    assert error["request_id"] == answer.headers["request-id"]
