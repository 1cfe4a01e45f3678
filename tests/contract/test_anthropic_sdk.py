"""Anthropic's own Python client against the server. Nothing here depends on what the model says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

HI: list[Any] = [{"role": "user", "content": "Count from 1 to 200."}]
ADD: dict[str, Any] = {
    "name": "add",
    "description": "Add two whole numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [3, 4]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
GREEDY = {"temperature": 0}
TIMEOUT_S = 120.0


@pytest.fixture
def client(target: Any) -> Iterator[Anthropic]:
    with Anthropic(base_url=target.url, api_key=target.api_key, timeout=TIMEOUT_S, max_retries=0) as found:
        yield found


@pytest.fixture
def model(target: Any) -> str:
    name: str = target.model
    return name


def test_a_message_is_counted_as_count_tokens_says(client: Anthropic, model: str) -> None:
    counted = client.messages.count_tokens(model=model, messages=HI, system="Be brief.")
    made = client.messages.create(model=model, messages=HI, system="Be brief.", max_tokens=5, extra_body=GREEDY)
    usage = made.usage
    created, read = usage.cache_creation_input_tokens or 0, usage.cache_read_input_tokens or 0
    assert counted.input_tokens == usage.input_tokens + created + read
    assert (made.model, made.stop_reason, usage.output_tokens) == (model, "max_tokens", 5)
    assert made._request_id


def test_stream_helper_adds_up_to_the_message(client: Anthropic, model: str) -> None:
    whole = client.messages.create(model=model, messages=HI, max_tokens=8, extra_body=GREEDY)
    with client.messages.stream(model=model, messages=HI, max_tokens=8, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.text for block in whole.content if block.type == "text"] == [text]
    assert final.content[0].text == text  # type: ignore[union-attr]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_a_forced_call_has_an_input_of_its_schema(client: Anthropic, model: str) -> None:
    choice: Any = {"type": "tool", "name": "add"}
    asked: dict[str, Any] = {"model": model, "tools": [ADD], "extra_body": GREEDY}
    made = client.messages.create(messages=HI, max_tokens=100, tool_choice=choice, **asked)
    [call] = [block for block in made.content if block.type == "tool_use"]
    assert (call.name, made.stop_reason) == ("add", "tool_use")
    assert call.input["a"] in (1, 2)
    assert call.input["b"] in (3, 4)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "5"}
    again: list[Any] = [*HI, {"role": "assistant", "content": made.content}, {"role": "user", "content": [result]}]
    client.messages.create(messages=again, max_tokens=2, **asked)


def test_errors_are_typed(client: Anthropic, model: str) -> None:
    with pytest.raises(anthropic.NotFoundError, match="no-such-model"):
        client.messages.create(model="no-such-model", messages=HI, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: [0-9]+ tokens > 1023 maximum"):
        client.messages.create(model=model, messages=HI, system="river " * 2000, max_tokens=1)
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model=model, messages=HI, max_tokens=1)


def test_models_are_listed(client: Anthropic, model: str) -> None:
    assert [found.id for found in client.models.list()] == [model]
    assert client.models.retrieve(model).max_input_tokens == 1024
