"""POST /v1/chat/completions over the whole server but for the model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hello there"}]


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={"messages": HI, "max_tokens": 6, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that ends well."""
    answer = await client.post(PATH, json={"messages": HI, "max_tokens": 6, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def test_answer_has_openais_shape(client: httpx.AsyncClient) -> None:
    answer = await ask(client)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "org/fake-model"
    assert answer["system_fingerprint"].startswith("fp_")
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["refusal"] is None
    assert len(choice["message"]["content"].split()) >= 3
    usage = answer["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


async def test_stream_has_openais_shape(client: httpx.AsyncClient) -> None:
    chunks = await stream(client)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert not any("usage" in chunk for chunk in chunks)


async def test_stream_says_the_same_as_the_whole_answer(client: httpx.AsyncClient) -> None:
    answer = await ask(client, temperature=0)
    assert text_of(await stream(client, temperature=0)) == answer["choices"][0]["message"]["content"]


async def test_usage_comes_in_one_more_chunk_when_asked_for(client: httpx.AsyncClient) -> None:
    answer = await ask(client)
    *chunks, last = await stream(client, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == answer["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_counts_so_far_come_with_every_chunk_when_asked_for(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await stream(client, n=2, temperature=1, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] > 0
    assert counts[0] > 0
    assert all(chunk["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] > 0 for chunk in chunks)


async def test_each_choice_opens_and_ends_once(client: httpx.AsyncClient) -> None:
    chunks = await stream(client, n=3, temperature=1, seed=1, stream_options={"include_usage": True})
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert [c["delta"].get("role") for c in own] == ["assistant"] + [None] * (len(own) - 1)
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]
    assert chunks[-1]["usage"]["completion_tokens"] == 18
    prompt_tokens = (await ask(client))["usage"]["prompt_tokens"]
    assert chunks[-1]["usage"]["prompt_tokens"] == prompt_tokens


async def test_choices_come_in_order(client: httpx.AsyncClient) -> None:
    answer = await ask(client, n=4, temperature=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


async def test_text_ends_before_the_stop_string(client: httpx.AsyncClient) -> None:
    full = (await ask(client, max_tokens=20))["choices"][0]["message"]["content"]
    stop = full[len(full) // 2 :][:4]
    choice = (await ask(client, max_tokens=20, stop=stop))["choices"][0]
    assert choice["message"]["content"] == full[: full.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert text_of(await stream(client, max_tokens=20, stop=["never", stop])) == full[: full.index(stop)]


async def test_logprobs_have_one_entry_a_token(client: httpx.AsyncClient) -> None:
    choice = (await ask(client, logprobs=True, top_logprobs=3))["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    streamed = [
        entry
        for chunk in await stream(client, logprobs=True, top_logprobs=3)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


async def test_logprobs_alone_have_no_alternatives(client: httpx.AsyncClient) -> None:
    content = (await ask(client, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[]] * 6


@pytest.mark.parametrize("model", ["org/fake-model", "/models/fake", "default", None])
async def test_model_has_several_names(client: httpx.AsyncClient, model: str | None) -> None:
    assert (await ask(client, model=model))["model"] == "org/fake-model"


async def test_unknown_model_is_named_beside_the_known_one(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"model": "other-9", "messages": HI})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "other-9" in error["message"]
    assert "org/fake-model" in error["message"]


async def test_too_long_prompt_is_refused_before_a_stream_begins(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "word " * 5000}]
    answer = await client.post(PATH, json={"messages": messages, "stream": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_body_needs_no_content_type(client: httpx.AsyncClient) -> None:
    body = json.dumps({"messages": HI, "max_tokens": 2})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert (await client.post(PATH, content=body, headers=headers)).status_code == 200
    assert (await client.post(PATH, content=body)).status_code == 200
