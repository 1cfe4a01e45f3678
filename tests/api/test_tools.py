"""Tools and reasoning through POST /v1/chat/completions: a fake model writes what a real one would."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers
from fixtures_says import THINKING, Says
from fixtures_server import Parts, client_of, running
from fixtures_text import EOS_ID, write_tokenizer

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
ASK = [{"role": "user", "content": "weather in Paris"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Looks.", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def says(backend: tokenizers.Tokenizer) -> Says:
    return Says(backend)


@pytest.fixture(scope="module")
def runner_options(backend: tokenizers.Tokenizer, says: Says) -> dict[str, Any]:
    return {"script": says, "vocab_size": backend.get_vocab_size(), "max_model_len": 4096}


@pytest.fixture(scope="module")
async def thinker(
    tmp_path_factory: pytest.TempPathFactory, runner_options: dict[str, Any]
) -> AsyncIterator[httpx.AsyncClient]:
    """A model whose template knows tools and opens reasoning."""
    folder: Path = tmp_path_factory.mktemp("thinker")
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(THINKING)
    config = Config(model="/models/thinker", engine="thread")
    async with running(folder, config, **runner_options) as parts, client_of(parts.app) as client:
        yield client


async def ask(client: httpx.AsyncClient, says: Says, text: str, **fields: Any) -> dict[str, Any]:
    """The choice of a whole answer, with the request's usage."""
    says.text = text
    answer = await client.post(PATH, json={"messages": ASK, "temperature": 0, "max_tokens": 400, **fields})
    assert answer.status_code == 200, answer.text
    return {**answer.json()["choices"][0], "usage": answer.json()["usage"]}


async def stream(client: httpx.AsyncClient, says: Says, text: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a stream's chunks."""
    says.text = text
    body = {"messages": ASK, "temperature": 0, "max_tokens": 400, "stream": True, **fields}
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    blocks = answer.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: "))["choices"][0] for block in blocks[:-2]]


async def refusal(client: httpx.AsyncClient, **fields: Any) -> tuple[str, str]:
    answer = await client.post(PATH, json={"messages": ASK, "max_tokens": 4, **fields})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["param"], answer.json()["error"]["message"]


def joined(choices: list[dict[str, Any]], name: str) -> str:
    return "".join(choice["delta"].get(name, "") for choice in choices)


async def test_call_is_answered_in_openais_shape(client: httpx.AsyncClient, says: Says) -> None:
    choice = await ask(client, says, f"I look. {CALL}", tools=[TOOL])
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"].strip() == "I look."
    (call,) = message["tool_calls"]
    assert call.keys() == {"id", "type", "function"}
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert "reasoning" not in message


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "mood"}}])
async def test_a_call_that_must_come_comes_whatever_the_model_wants(
    client: httpx.AsyncClient, says: Says, choice: Any
) -> None:
    parameters = {"type": "object", "properties": {"is": {"enum": ["good", "bad"]}}, "required": ["is"]}
    mood = {
        "type": "function",
        "function": {"name": "mood", "parameters": {**parameters, "additionalProperties": False}},
    }
    found = await ask(client, says, "", tools=[mood], tool_choice=choice, parallel_tool_calls=False)
    assert found["finish_reason"] == "tool_calls"
    [call] = found["message"]["tool_calls"]
    assert call["function"]["name"] == "mood"
    assert json.loads(call["function"]["arguments"])["is"] in ("good", "bad")


async def test_arguments_that_no_parser_reads_are_shown_as_they_are(client: httpx.AsyncClient, says: Says) -> None:
    async def answered(arguments: str) -> httpx.Response:
        call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        result = {"role": "tool", "tool_call_id": "a", "content": "18 degrees"}
        turns = [*ASK, {"role": "assistant", "tool_calls": [call]}, result]
        return await client.post(PATH, json={"messages": turns, "max_tokens": 4, "tools": [TOOL]})

    assert (await answered("{junk")).status_code == 200
    nested = (await answered('{"a":' * 2000 + "1" + "}" * 2000)).json()
    assert nested["error"]["code"] == "context_length_exceeded"


async def test_content_is_null_beside_calls_alone(client: httpx.AsyncClient, says: Says) -> None:
    message = (await ask(client, says, CALL, tools=[TOOL]))["message"]
    assert message["content"] is None
    assert len(message["tool_calls"]) == 1


async def test_call_is_streamed_with_its_name_first(client: httpx.AsyncClient, says: Says) -> None:
    choices = await stream(client, says, f"I look. {CALL}", tools=[TOOL])
    pieces = [piece for choice in choices for piece in choice["delta"].get("tool_calls", [])]
    assert {piece["index"] for piece in pieces} == {0}
    first, *rest = pieces
    assert first["id"].startswith("call_")
    assert (first["type"], first["function"]["name"]) == ("function", "weather")
    assert rest
    assert all(piece.keys() == {"index", "function"} for piece in rest)
    assert all(piece["function"].keys() == {"arguments"} for piece in rest)
    arguments = "".join(piece["function"].get("arguments", "") for piece in pieces)
    assert json.loads(arguments) == {"city": "Paris"}
    assert joined(choices, "content").strip() == "I look."
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_text_is_left_alone_without_tools(client: httpx.AsyncClient, says: Says) -> None:
    for fields in ({}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = await ask(client, says, CALL, **fields)
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"


async def test_answer_ends_after_one_call_if_calls_may_not_be_parallel(client: httpx.AsyncClient, says: Says) -> None:
    both = CALL + "\n" + CALL.replace("Paris", "Rome")
    assert len((await ask(client, says, both, tools=[TOOL]))["message"]["tool_calls"]) == 2
    choice = await ask(client, says, both, tools=[TOOL], parallel_tool_calls=False)
    assert [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]] == [
        {"city": "Paris"}
    ]
    assert choice["finish_reason"] == "tool_calls"


async def test_call_that_is_cut_off_says_length(client: httpx.AsyncClient, says: Says) -> None:
    choice = await ask(client, says, CALL.replace("Paris", "Paris " * 40), tools=[TOOL], max_tokens=90)
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert choice["finish_reason"] == "length"


async def test_stop_string_is_not_looked_for_in_calls(client: httpx.AsyncClient, says: Says) -> None:
    choice = await ask(client, says, CALL + "\nParis it is", tools=[TOOL], stop="Paris")
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris"}
    assert (choice["message"]["content"] or "").strip() == ""


async def test_template_without_tools_gets_them_as_text(client: httpx.AsyncClient, says: Says) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    await ask(client, says, "It rains.", tools=[TOOL], messages=history)
    prompt = says.prompts[-1]
    assert prompt.count("<|im_start|>system") == 1
    assert "Be brief." in prompt
    assert '"name": "weather", "description": "Looks."' in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in prompt
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response>" in prompt


async def test_template_with_tools_gets_them_in_openais_shape(thinker: httpx.AsyncClient, says: Says) -> None:
    await ask(thinker, says, "</think>x", tools=[TOOL, OTHER])
    assert f"<tools>{json.dumps(TOOL)}" in says.prompts[-1]
    assert '{"type": "function", "function": {"name": "clock"' in says.prompts[-1]
    await ask(thinker, says, "</think>x", tools=[TOOL], tool_choice="none")
    assert "<tools>" not in says.prompts[-1]


async def test_only_allowed_tools_are_shown(thinker: httpx.AsyncClient, says: Says) -> None:
    named = {"type": "function", "function": {"name": "clock"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    await ask(thinker, says, "</think>x", tools=[TOOL, OTHER], tool_choice=choice)
    assert "clock" in says.prompts[-1]
    assert '"weather"' not in says.prompts[-1]


async def test_cache_report_says_that_tools_differ(client: httpx.AsyncClient, says: Says) -> None:
    says.text = "x"
    messages = [{"role": "system", "content": "the quick brown fox " * 20}, *ASK]
    reasons = []
    for tools in ([TOOL], [OTHER], [OTHER]):
        body = {"messages": messages, "tools": tools, "cache_report": True, "max_tokens": 4}
        reasons.append((await client.post(PATH, json=body)).json()["cache"]["reason"])
    assert reasons[1:] == ["different_tools", "hit"]


async def test_reasoning_comes_under_both_names_and_is_counted(thinker: httpx.AsyncClient, says: Says) -> None:
    choice = await ask(thinker, says, "Let me see.\n</think>\n\nIt rains.")
    message = choice["message"]
    assert message["content"] == "\n\nIt rains."
    assert message["reasoning_content"] == message["reasoning"] == "Let me see.\n"
    usage = choice["usage"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert choice["finish_reason"] == "stop"


async def test_reasoning_is_streamed_before_the_answer(thinker: httpx.AsyncClient, says: Says) -> None:
    choices = await stream(thinker, says, "Let me see.</think>It rains.")
    assert joined(choices, "reasoning_content") == joined(choices, "reasoning") == "Let me see."
    assert joined(choices, "content") == "It rains."
    kinds = ["reasoning" in c["delta"] for c in choices if {"reasoning", "content"} & c["delta"].keys()][1:]
    assert kinds == sorted(kinds, reverse=True)


async def test_reasoning_can_be_left_out(thinker: httpx.AsyncClient, says: Says) -> None:
    choice = await ask(thinker, says, "Let me see.</think>It rains.", include_reasoning=False)
    assert not {"reasoning", "reasoning_content"} & choice["message"].keys()
    assert choice["message"]["content"] == "It rains."
    assert choice["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    choices = await stream(thinker, says, "Let me see.</think>It rains.", include_reasoning=False)
    assert (joined(choices, "reasoning"), joined(choices, "content")) == ("", "It rains.")


async def test_answer_is_no_reasoning_when_the_prompt_opened_none(thinker: httpx.AsyncClient, says: Says) -> None:
    message = (await ask(thinker, says, "It rains.", enable_thinking=False))["message"]
    assert message["content"] == "It rains."
    assert "reasoning" not in message


async def test_model_that_does_not_think_answers_at_once(client: httpx.AsyncClient, says: Says) -> None:
    choices = await stream(client, says, "It rains.</think>")
    assert joined(choices, "content") == "It rains.</think>"
    assert joined(choices, "reasoning") == ""


async def test_reasoning_and_call_in_one_answer(thinker: httpx.AsyncClient, says: Says) -> None:
    message = (await ask(thinker, says, f"Look it up.</think>{CALL}", tools=[TOOL]))["message"]
    assert message["reasoning"] == "Look it up."
    assert message["tool_calls"][0]["function"]["name"] == "weather"


async def test_logprobs_have_one_entry_a_token_whatever_it_became(thinker: httpx.AsyncClient, says: Says) -> None:
    text = f"Look it up.</think>I do. {CALL}"
    choice = await ask(thinker, says, text, tools=[TOOL], logprobs=True)
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == text
    streamed = await stream(thinker, says, text, tools=[TOOL], logprobs=True)
    tokens = [e["token"] for c in streamed for e in (c["logprobs"] or {"content": []})["content"]]
    assert "".join(tokens) == text


async def test_earlier_reasoning_reaches_the_template(thinker: httpx.AsyncClient, says: Says) -> None:
    for name in ("reasoning", "reasoning_content"):
        turn = {"role": "assistant", "content": "Rain.", name: f"old {name}"}
        await ask(thinker, says, "</think>x", messages=[*ASK, turn, *ASK])
        assert f"<think>old {name}</think>Rain." in says.prompts[-1]


async def test_final_message_is_continued(thinker: httpx.AsyncClient, says: Says) -> None:
    messages = [*ASK, {"role": "assistant", "content": "<think>Let me"}]
    choice = await ask(thinker, says, " see</think> Rain.", messages=messages, continue_final_message=True)
    message = choice["message"]
    assert says.prompts[-1].endswith("<|im_start|>assistant\n<think>Let me")
    assert (message["reasoning"], message["content"]) == (" see", " Rain.")


async def test_prompt_ends_with_the_messages_if_no_beginning_is_wanted(thinker: httpx.AsyncClient, says: Says) -> None:
    await ask(thinker, says, "x", add_generation_prompt=False)
    assert says.prompts[-1].endswith("weather in Paris<|im_end|>\n")


async def test_stop_string_may_be_returned(client: httpx.AsyncClient, says: Says) -> None:
    choice = await ask(client, says, "one two three", stop="two", include_stop_str_in_output=True)
    assert choice["message"]["content"] == "one two"


async def test_special_tokens_may_be_shown(client: httpx.AsyncClient, says: Says) -> None:
    text = "one<|im_start|>two"
    assert (await ask(client, says, text))["message"]["content"] == "onetwo"
    assert (await ask(client, says, text, skip_special_tokens=False))["message"]["content"] == text


async def test_token_ids_are_returned_when_asked_for(client: httpx.AsyncClient, says: Says, parts: Parts) -> None:
    says.text = "one two"
    body = {"messages": ASK, "temperature": 0, "return_token_ids": True}
    answer = (await client.post(PATH, json=body)).json()
    ids = answer["choices"][0]["token_ids"]
    assert parts.tokenizer.decode(ids) == "one two"
    assert len(ids) == answer["usage"]["completion_tokens"]
    assert ids[-1] == EOS_ID
    assert parts.tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False) == says.prompts[-1]
    streamed = (await client.post(PATH, json={**body, "stream": True})).text.split("\n\n")
    last = json.loads(streamed[-3].removeprefix("data: "))
    assert (last["prompt_token_ids"], last["choices"][0]["token_ids"]) == (answer["prompt_token_ids"], ids)
    assert "token_ids" not in (await ask(client, says, "one two"))


async def test_service_tier_is_named_in_the_answer(client: httpx.AsyncClient, says: Says) -> None:
    says.text = "yes"
    for given, served in (("flex", "flex"), ("auto", "default"), ("priority", "priority")):
        answer = await client.post(PATH, json={"messages": ASK, "service_tier": given, "max_tokens": 4})
        assert answer.json()["service_tier"] == served


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools.1.function.name"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice"),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"service_tier": "best"}, "service_tier"),
        ({"store": True}, "store"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [5, 100_000]}, "allowed_token_ids"),
        ({"bad_words": ["x", " "]}, "bad_words"),
        ({"bad_words": ["x" * 501]}, "bad_words.0"),
    ],
)
async def test_refusal_names_the_field(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert (await refusal(client, **fields))[0] == param


async def test_tools_loop_with_the_official_client(parts: Parts, says: Says) -> None:
    async with client_of(parts.app) as http:
        sdk = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
        says.text = CALL
        tools: Any = [TOOL]
        messages: Any = list(ASK)
        first = await sdk.chat.completions.create(model="default", messages=messages, tools=tools, temperature=0)
        calls = first.choices[0].message.tool_calls
        assert calls
        assert json.loads(calls[0].function.arguments) == {"city": "Paris"}
        messages += [
            first.choices[0].message.model_dump(),
            {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"},
        ]
        says.text = "It rains."
        second = await sdk.chat.completions.create(model="default", messages=messages, tools=tools, temperature=0)
        assert second.choices[0].message.content == "It rains."


async def test_stream_of_the_official_client_finds_the_calls(parts: Parts, says: Says) -> None:
    async with client_of(parts.app) as http:
        sdk = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
        says.text = f"I look. {CALL}\n{CALL.replace('Paris', 'Rome')}"
        function = {**TOOL["function"], "strict": True, "parameters": {**PARAMETERS, "additionalProperties": False}}
        tools: Any = [{"type": "function", "function": function}]
        messages: Any = list(ASK)
        asking = sdk.chat.completions.stream(model="default", messages=messages, tools=tools, temperature=0)
        async with asking as events:
            ends = [event async for event in events if event.type == "tool_calls.function.arguments.done"]
            final = await events.get_final_completion()
        told = [(end.index, end.parsed_arguments) for end in ends]
        assert told == [(0, {"city": "Paris"}), (1, {"city": "Rome"})]
        calls = final.choices[0].message.tool_calls
        assert calls
        assert len({call.id for call in calls}) == 2
        assert final.choices[0].finish_reason == "tool_calls"
