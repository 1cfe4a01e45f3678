"""POST /v1/completions over the whole server but for the model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={"prompt": "once upon a time", "max_tokens": 5, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": "once upon a time", "max_tokens": 5, "stream": True, **fields}
    blocks = (await client.post(PATH, json=body)).text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


async def test_answer_has_openais_shape(client: httpx.AsyncClient) -> None:
    answer = await ask(client)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert answer["usage"]["completion_tokens"] == 5


async def test_stream_says_the_same_as_the_whole_answer(client: httpx.AsyncClient) -> None:
    answer = await ask(client, prompt=["once upon", "one two three"])
    *chunks, last = await stream(client, prompt=["once upon", "one two three"], stream_options={"include_usage": True})
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in range(2):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == answer["choices"][index]["text"]
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
    assert last["usage"] == answer["usage"]
    assert len({chunk["id"] for chunk in (*chunks, last)}) == 1


async def test_choices_are_numbered_by_prompt_then_by_n(client: httpx.AsyncClient) -> None:
    one = (await ask(client, prompt="one"))["choices"][0]["text"]
    two = (await ask(client, prompt="two"))["choices"][0]["text"]
    choices = (await ask(client, prompt=["one", "two"], n=2))["choices"]
    assert [choice["text"] for choice in choices] == [one, one, two, two]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]


async def test_token_ids_are_a_prompt(client: httpx.AsyncClient) -> None:
    assert (await ask(client, prompt=[5, 6, 7]))["usage"]["prompt_tokens"] == 3
    assert (await ask(client, prompt=[[5, 6], [7]]))["usage"]["prompt_tokens"] == 3


async def test_token_id_outside_the_vocabulary_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"prompt": [10**6]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


async def test_echo_begins_with_the_prompt(client: httpx.AsyncClient) -> None:
    plain = (await ask(client))["choices"][0]["text"]
    assert (await ask(client, echo=True))["choices"][0]["text"] == "once upon a time" + plain
    chunks = await stream(client, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "once upon a time" + plain


async def test_logprobs_are_parallel_lists(client: httpx.AsyncClient) -> None:
    choice = (await ask(client, logprobs=2))["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {5}
    assert "".join(logprobs["tokens"]) == choice["text"]
    text, offsets = choice["text"], logprobs["text_offset"]
    assert [text[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == logprobs["tokens"]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


async def test_offsets_go_on_through_a_stream(client: httpx.AsyncClient) -> None:
    whole = (await ask(client, logprobs=0))["choices"][0]["logprobs"]["text_offset"]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in await stream(client, logprobs=0)]
    assert [offset for piece in pieces if piece for offset in piece["text_offset"]] == whole
