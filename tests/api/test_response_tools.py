"""Tools and reasoning through /v1/responses: a fake model writes what a real one would."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from fixtures_server import client_of, running
from fixtures_text import EOS_ID, write_tokenizer

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio

WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": None,
}
PATCH = {
    "type": "custom",
    "name": "patch",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
SPACE = {"type": "namespace", "name": "mcp", "description": "d", "tools": [WEATHER]}
TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %} <tool_call> </think></tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


class Says:
    """Writes `text` behind the prompt `<think>\\n`, then ends its turn."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.text = ""
        self.prompt = ""

    def __call__(self, tokens: tuple[int, ...]) -> int:
        whole = self._backend.decode(list(tokens), skip_special_tokens=False)
        self.prompt, _, said = whole.rpartition("<|im_start|>assistant\n<think>\n")
        ids = self._backend.encode(self.text, add_special_tokens=False).ids
        done = len(self._backend.encode(said, add_special_tokens=False).ids)
        return ids[done] if done < len(ids) else EOS_ID


@pytest.fixture(scope="module")
def says(backend: tokenizers.Tokenizer) -> Says:
    return Says(backend)


@pytest.fixture(scope="module")
async def thinker(
    tmp_path_factory: pytest.TempPathFactory, says: Says, backend: tokenizers.Tokenizer
) -> AsyncIterator[httpx.AsyncClient]:
    """A model whose template knows tools and opens reasoning."""
    folder: Path = tmp_path_factory.mktemp("thinker")
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    options = {"script": says, "vocab_size": backend.get_vocab_size(), "max_model_len": 4096}
    config = Config(model="/models/t", engine="thread")
    async with running(folder, config, **options) as parts, client_of(parts.app) as client:
        yield client


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"input": "weather in Paris", "temperature": 0, "max_output_tokens": 300, **fields}
    answer = await client.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def call(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


async def test_reasoning_text_and_call_are_items(thinker: httpx.AsyncClient, says: Says) -> None:
    says.text = "hm\n</think>\n\nSo:\n" + call("weather", {"city": "Paris"})
    made = await ask(thinker, tools=[WEATHER], include=["reasoning.encrypted_content"])
    thought, said, called = made["output"]
    assert "hm" in thought["content"][0]["text"]
    assert said["content"][0]["text"].strip() == "So:"
    assert (called["type"], called["name"], json.loads(called["arguments"])) == (
        "function_call",
        "weather",
        {"city": "Paris"},
    )
    assert made["status"] == "completed"
    assert made["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    # A client that keeps nothing on the server brings all of it back, and the model sees it.
    thought = {"type": "reasoning", "summary": [], "encrypted_content": thought["encrypted_content"]}
    result = {"type": "function_call_output", "call_id": called["call_id"], "output": "18 degrees"}
    says.text = "</think>warm"
    history = [{"role": "user", "content": "weather in Paris"}, thought, said, called, result]
    again = await ask(thinker, tools=[WEATHER], input=history, store=False)
    assert again["output"][-1]["content"][0]["text"] == "warm"
    assert "<think>hm" in says.prompt
    assert "18 degrees" in says.prompt
    # One that lets the server keep it sends the result alone, and the model sees the same.
    by_hand = says.prompt
    await ask(thinker, tools=[WEATHER], input=[result], previous_response_id=made["id"])
    assert says.prompt == by_hand


async def test_a_custom_tool_is_called_with_text(thinker: httpx.AsyncClient, says: Says) -> None:
    says.text = (
        '</think><tool_call>\n<function=patch>\n<parameter=input>\n*** "Begin"\n</parameter>\n</function>\n</tool_call>'
    )
    made = await ask(thinker, tools=[PATCH, {"type": "web_search"}])
    (called,) = [item for item in made["output"] if item["type"] != "reasoning"]
    assert (called["type"], called["name"], called["input"]) == ("custom_tool_call", "patch", '*** "Begin"')
    assert "start: /.+/" in says.prompt
    assert "web_search" not in says.prompt
    assert made["tools"] == [PATCH, {"type": "web_search"}]


async def test_tools_of_a_namespace_keep_it(thinker: httpx.AsyncClient, says: Says) -> None:
    says.text = "</think>" + call("mcp__weather", {"city": "Paris"})
    made = await ask(thinker, tools=[SPACE, WEATHER])
    called = made["output"][-1]
    assert (called["name"], called["namespace"]) == ("weather", "mcp")


async def test_without_a_choice_of_tools_none_is_shown(thinker: httpx.AsyncClient, says: Says) -> None:
    says.text = "</think>no"
    made = await ask(thinker, tools=[WEATHER], tool_choice="none")
    assert "weather</tools>" not in says.prompt
    assert "<tools>" not in says.prompt
    assert made["output"][-1]["content"][0]["text"] == "no"


async def test_tools_of_the_same_name_are_refused(thinker: httpx.AsyncClient) -> None:
    answer = await thinker.post("/v1/responses", json={"input": "x", "tools": [WEATHER, WEATHER]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools.1.name")
