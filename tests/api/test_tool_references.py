"""Tools that are not listed in the prompt until a search of the client's has found them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic.types
import httpx
import pytest
import tokenizers
from fixtures_says import THINKING, Says
from fixtures_server import client_of, running
from fixtures_text import write_tokenizer

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio
SEARCH = {"name": "find_tools", "description": "Finds tools.", "input_schema": {"type": "object", "properties": {}}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Looks at the sky.", "input_schema": CITY, "defer_loading": True}
TIDES = {"name": "tides", "description": "Looks at the sea.", "input_schema": CITY, "defer_loading": True}
TOOLS = [SEARCH, WEATHER, TIDES]
ASK: list[dict[str, Any]] = [{"role": "user", "content": "weather in Paris"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def found(*names: str, text: str | None = None) -> list[dict[str, Any]]:
    """A conversation in which these tools were looked up."""
    parts: list[dict[str, Any]] = [{"type": "tool_reference", "tool_name": name} for name in names]
    content = [*([{"type": "text", "text": text}] if text else []), *parts]
    return [
        *ASK,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "find_tools", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": content}]},
    ]


@pytest.fixture(scope="module")
def says(backend: tokenizers.Tokenizer) -> Says:
    return Says(backend)


@pytest.fixture(scope="module")
async def client(
    tmp_path_factory: pytest.TempPathFactory, backend: tokenizers.Tokenizer, says: Says
) -> AsyncIterator[httpx.AsyncClient]:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(THINKING)
    options = {"script": says, "vocab_size": backend.get_vocab_size(), "max_model_len": 2048}
    config = Config(model="/models/fake", engine="thread")
    async with running(folder, config, **options) as parts, client_of(parts.app) as made:
        yield made


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    sent = {"messages": ASK, "tools": TOOLS, "max_tokens": 100, "temperature": 0, "thinking": {"type": "disabled"}}
    return await client.post("/v1/messages", json={**sent, **fields})


async def prompt_of(client: httpx.AsyncClient, says: Says, **fields: Any) -> str:
    """What the model reads."""
    says.text = "ok"
    answer = await ask(client, **fields)
    assert answer.status_code == 200, answer.text
    return says.prompts[-1]


async def refusal(client: httpx.AsyncClient, **fields: Any) -> str:
    answer = await ask(client, **fields)
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["message"])


async def test_deferred_tool_is_not_in_the_prompt(client: httpx.AsyncClient, says: Says) -> None:
    prompt = await prompt_of(client, says)
    assert "find_tools" in prompt
    assert "sky" not in prompt
    assert "sea" not in prompt


async def test_reference_shows_the_tool_in_the_result(client: httpx.AsyncClient, says: Says) -> None:
    before = await prompt_of(client, says)
    prompt = await prompt_of(client, says, messages=found("weather", text="Found one:"))
    assert prompt.startswith(before.removesuffix("<|im_start|>assistant\n"))
    result = prompt.rpartition("<|im_start|>tool")[2]
    assert "Found one:" in result
    assert '"description": "Looks at the sky."' in result
    assert '"required": ["city"]' in result
    assert "sea" not in prompt


async def test_references_in_a_row_are_one_list(client: httpx.AsyncClient, says: Says) -> None:
    result = (await prompt_of(client, says, messages=found("weather", "tides"))).rpartition("<|im_start|>tool")[2]
    assert result.count("<tools>") == result.count("</tools>") == 1
    assert result.index("weather") < result.index("tides")


@pytest.mark.parametrize("messages", [ASK, found("weather")], ids=["announced", "loaded"])
async def test_call_of_a_deferred_tool_is_read(
    messages: list[dict[str, Any]], client: httpx.AsyncClient, says: Says
) -> None:
    says.text = CALL
    answer = (await ask(client, messages=messages)).json()
    anthropic.types.Message.model_validate(answer)
    assert answer["stop_reason"] == "tool_use"
    assert answer["content"][0]["input"] == {"city": "Paris"}


async def test_model_is_made_to_call_only_what_it_has_seen(client: httpx.AsyncClient) -> None:
    forced = {"tool_choice": {"type": "tool", "name": "weather"}}
    assert "is deferred and named by no tool_reference" in await refusal(client, **forced)
    answer = await ask(client, **forced, messages=found("weather"))
    assert [block["name"] for block in answer.json()["content"]] == ["weather"]
    answer = await ask(client, tool_choice={"type": "any"})
    assert [block["name"] for block in answer.json()["content"]] == ["find_tools"]


async def test_what_cannot_be_looked_up_is_refused(client: httpx.AsyncClient) -> None:
    message = await refusal(client, messages=found("weather", "moon"))
    assert message.startswith("messages.2.content.0.content.1.tool_name is 'moon', which is not among the tools")
    assert "all of them have defer_loading" in await refusal(client, tools=[WEATHER, TIDES])
    searched = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
    assert "answer its calls with tool_reference blocks" in await refusal(client, tools=[searched, WEATHER])


async def test_tokens_of_a_reference_are_counted(client: httpx.AsyncClient, says: Says) -> None:
    body = {"messages": found("weather"), "tools": TOOLS, "thinking": {"type": "disabled"}}
    counted = (await client.post("/v1/messages/count_tokens", json=body)).json()["input_tokens"]
    says.text = "ok"
    usage = (await ask(client, messages=found("weather"))).json()["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]


async def test_answer_that_is_too_long_is_refused_in_words_that_clients_know(client: httpx.AsyncClient) -> None:
    expected = "max_tokens: 128000 > 32768, which is the maximum allowed number of output tokens for this model"
    assert await refusal(client, max_tokens=128_000) == expected
