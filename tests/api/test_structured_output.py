"""Shapes of answers over HTTP, with a model that writes words unless it is held to something else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from fixtures_server import Parts, client_of, running
from fixtures_text import WordScript, write_tokenizer

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}
NAMED = {"name": "thing", "schema": SCHEMA, "strict": True}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Parts]:
    script = WordScript(write_tokenizer(tmp_path), eos_every=3)
    async with running(tmp_path, Config(model="demo", max_tokens=400), script=script, vocab_size=640) as found:
        yield found


@pytest.fixture
async def client(parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(parts.app) as opened:
        yield opened


async def chat(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/chat/completions", json={"messages": HELLO, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def text_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": NAMED}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA, "logprobs": True, "presence_penalty": 1.0, "seed": 3},
        {"guided_json": SCHEMA, "min_tokens": 300},
        {"guided_json": SCHEMA, "ignore_eos": True},
    ],
)
async def test_an_answer_matches_its_schema(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    jsonschema.validate(json.loads(text_of(await chat(client, **fields))), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"structured_outputs": {"choice": ["fox", "dog"]}}, {"fox", "dog"}),
        ({"guided_choice": ["fox", "dog"]}, {"fox", "dog"}),
        ({"guided_regex": "[xy]z"}, {"xz", "yz"}),
        ({"guided_grammar": 'start: "a" ("b" | "c")'}, {"ab", "ac"}),
    ],
)
async def test_an_answer_is_one_that_the_shape_allows(
    client: httpx.AsyncClient, fields: dict[str, Any], texts: set[str]
) -> None:
    assert text_of(await chat(client, **fields)) in texts
    answer = await client.post("/v1/completions", json={"prompt": "the quick", "max_tokens": 20, **fields})
    assert text_of(answer.json()) in texts


async def test_a_stream_gives_the_same_text(client: httpx.AsyncClient) -> None:
    fields = {"guided_json": SCHEMA, "seed": 1, "temperature": 0}
    whole = text_of(await chat(client, **fields))
    answer = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True, **fields})
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == whole


async def test_every_choice_of_a_request_is_held_to_the_shape(client: httpx.AsyncClient) -> None:
    answer = await chat(client, guided_regex="[a-f]{3}", n=4, seed=1)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert all(len(text) == 3 and set(text) <= set("abcdef") for text in texts)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {**NAMED, "schema": {"items": {"uniqueItems": True}}},
                }
            },
            "response_format.json_schema.schema.items.uniqueItems",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: ("}, "guided_grammar"),
    ],
)
async def test_a_shape_that_cannot_be_guaranteed_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, parts: Parts, fields: dict[str, Any], param: str
) -> None:
    answer = await client.post("/v1/chat/completions", json={"messages": HELLO, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert parts.status().stats.num_steps == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_bad_words_do_not_come_up(client: httpx.AsyncClient, path: str) -> None:
    prompt: dict[str, Any] = {"messages": HELLO} if "chat" in path else {"prompt": "the quick"}

    async def words(**more: Any) -> list[str]:
        answer = (await client.post(path, json={**prompt, "max_tokens": 30, "n": 3, "ignore_eos": True, **more})).json()
        texts = [one["text"] if "text" in one else one["message"]["content"] for one in answer["choices"]]
        return [word for text in texts for word in text.split()]

    [word, *_] = await words()
    assert word not in await words(bad_words=[word])


async def test_only_allowed_tokens_are_written(client: httpx.AsyncClient) -> None:
    told = await client.post("/tokenize", json={"prompt": "fox", "add_special_tokens": False})
    answer = await chat(client, allowed_token_ids=told.json()["tokens"], max_tokens=5)
    assert set(answer["choices"][0]["message"]["content"]) <= set("fox")
