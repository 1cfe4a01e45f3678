"""/tokenize, /detokenize, /v1/chat/render, /v1/parse and what /v1/models tells."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.chat import test_cases
from vllm_mlx.chat.formats import tool_format_names
from vllm_mlx.chat.reasoning import reasoning_format_names

pytestmark = pytest.mark.anyio

HI = [{"role": "user", "content": "hello there"}]
PROMPT = "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refused(client: httpx.AsyncClient, path: str, **body: Any) -> str:
    answer = await client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["param"])


async def test_text_is_tokenized_and_back(client: httpx.AsyncClient) -> None:
    found = await post(client, "/tokenize", prompt="hello there 東京", return_token_strs=True)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    assert found["token_strs"][0] in "hello there"
    assert await post(client, "/detokenize", tokens=found["tokens"]) == {"prompt": "hello there 東京"}
    assert (await post(client, "/tokenize", prompt=""))["tokens"] == []


async def test_special_tokens_and_template_are_told(client: httpx.AsyncClient) -> None:
    found = (await client.get("/tokenizer_info")).json()
    assert (found["eos_token"], found["bos_token"], found["pad_token"]) == ("<|im_end|>", None, None)
    assert "add_generation_prompt" in found["chat_template"]
    assert found["model_max_length"] == (await post(client, "/tokenize", prompt="a"))["max_model_len"]


async def test_conversation_is_tokenized_like_a_chat_request(client: httpx.AsyncClient) -> None:
    found = await post(client, "/tokenize", messages=HI)
    assert found["token_strs"] is None
    assert (await post(client, "/detokenize", tokens=found["tokens"]))["prompt"] == PROMPT
    found = await post(client, "/tokenize", messages=HI, add_generation_prompt=False)
    without = (await post(client, "/detokenize", tokens=found["tokens"]))["prompt"]
    assert without == PROMPT.removesuffix("<|im_start|>assistant\n")
    with_tools = await post(client, "/tokenize", messages=HI, tools=[TOOL])
    assert "weather" in (await post(client, "/detokenize", tokens=with_tools["tokens"]))["prompt"]


async def test_wrong_bodies_are_refused_by_field(client: httpx.AsyncClient) -> None:
    assert await refused(client, "/tokenize") == "prompt"
    assert await refused(client, "/tokenize", prompt=5) == "prompt"
    assert await refused(client, "/tokenize", prompt="x", colour="red") == "colour"
    assert await refused(client, "/tokenize", messages=[{"role": "user"}]) == "messages.0.content"
    assert await refused(client, "/detokenize", tokens=[10**6]) == "tokens"
    assert await refused(client, "/detokenize", tokens=["x"]) == "tokens.0"
    assert (await client.post("/tokenize", json={"model": "other", "prompt": "x"})).status_code == 404


async def test_render_shows_what_the_model_would_see(client: httpx.AsyncClient) -> None:
    found = await post(client, "/v1/chat/render", messages=HI, temperature=0.5, max_tokens=7)
    assert found["prompt"] == PROMPT
    assert found["num_tokens"] == len(found["token_ids"])
    assert (await post(client, "/detokenize", tokens=found["token_ids"]))["prompt"] == PROMPT
    assert "add_generation_prompt" in found["chat_template"]
    assert (found["tools_shown_as"], found["tool_call_parser"], found["reasoning_parser"]) == (None, None, None)
    assert (found["sampling"]["temperature"], found["sampling"]["max_tokens"]) == (0.5, 7)
    found = await post(client, "/v1/chat/render", messages=HI, tools=[TOOL])
    assert (found["tools_shown_as"], found["tool_call_parser"]) == ("text", "hermes")
    assert '"name": "weather"' in found["prompt"]


async def test_text_is_parsed_as_asked(client: httpx.AsyncClient) -> None:
    text = 'Hm.</think>I look.<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    found = await post(client, "/v1/parse", text=text, tool_format="hermes", reasoning_format="qwen3", tools=[TOOL])
    assert (found["reasoning_content"], found["content"]) == ("Hm.", "I look.")
    (call,) = found["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "weather", "arguments": '{"city": "Rome"}'})
    kinds = [event["type"] for event in found["events"]]
    assert kinds[:2] == ["reasoning", "content"]
    assert set(kinds[2:]) == {"tool_call"}
    assert found["events"][2]["name"] == "weather"
    assert "name" not in found["events"][3]
    cut = await post(
        client, "/v1/parse", chunks=list(text), tool_format="nous", reasoning_format="deepseek_r1", prompt_tail=None
    )
    assert {**cut, "events": None} == {**found, "events": None}


async def test_nothing_is_looked_for_without_a_format(client: httpx.AsyncClient) -> None:
    text = '<think>Hm.</think><tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    found = await post(client, "/v1/parse", text=text, tool_format=None, reasoning_format=None, tools=[TOOL])
    assert (found["content"], found["tool_calls"]) == (text, [])


async def test_prompt_tail_decides_where_the_text_begins(client: httpx.AsyncClient) -> None:
    for tail, key in (("<think>\n", "reasoning_content"), ("", "content")):
        found = await post(client, "/v1/parse", text="Hm.", reasoning_format="qwen3", prompt_tail=tail)
        assert found[key] == "Hm."


async def test_wrong_parse_bodies_are_refused_by_field(client: httpx.AsyncClient) -> None:
    assert await refused(client, "/v1/parse") == "text"
    assert await refused(client, "/v1/parse", text="x", chunks=["x"]) == "text"
    assert await refused(client, "/v1/parse", text="x", tool_format="morse") == "tool_format"
    assert await refused(client, "/v1/parse", text="x", reasoning_format="morse") == "reasoning_format"
    assert await refused(client, "/v1/parse", text="x", tool_format="auto", tools=[{}]) == "tools.0.function.name"


@pytest.mark.skipif(not test_cases.CASES.is_dir(), reason="the cases are not here")
async def test_confirmed_cases_are_parsed(client: httpx.AsyncClient) -> None:
    asked, wrong = 0, []
    for _, case in test_cases.cases("*_tool*.json"):
        name = test_cases.format_of(case, tool_format_names())
        if case.get("agreement") == "confirmed" and case["id"] not in test_cases.ARGUED and name:
            asked += 1
            chunks = test_cases.pieces_of(case)
            tools = case.get("tools") or (case.get("request") or {}).get("tools") or []
            found = await post(client, "/v1/parse", chunks=chunks, tool_format=name, tools=tools, prompt_tail="")
            calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in found["tool_calls"]]
            expected = case["expected"].get("tool_calls") if isinstance(case["expected"], dict) else None
            if expected is not None and calls != [(c["name"], c.get("arguments_json")) for c in expected]:
                wrong.append(case["id"])
    for _, case in test_cases.cases("*_reasoning*.json"):
        name = test_cases.format_of(case, reasoning_format_names())
        kwargs = case.get("chat_template_kwargs") or {}
        if case.get("agreement") == "confirmed" and name and kwargs.get("enable_thinking") is not False:
            asked += 1
            found = await post(client, "/v1/parse", chunks=test_cases.pieces_of(case), reasoning_format=name)
            got = (found["reasoning_content"].strip(), found["content"].strip())
            if got != tuple(test_cases.stripped(case["expected"][key]) for key in ("reasoning", "content")):
                wrong.append(case["id"])
    assert asked > 100
    assert wrong == []


async def test_model_card_tells_what_the_model_can(client: httpx.AsyncClient) -> None:
    card = (await client.get("/v1/models")).json()["data"][0]
    assert card["context_length"] == card["context_window"] == card["max_model_len"] == 512
    assert card["max_output_tokens"] == 512
    assert card["capabilities"]["tools"] is True
    assert card["capabilities"]["reasoning"] is False
    assert (card["tool_call_parser"], card["reasoning_parser"]) == ("hermes", None)
    assert card["defaults"] == {}
