"""OpenAI's own Python client against the server. Nothing here depends on what the model says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Count from 1 to 200."}]
TIMEOUT_S = 120.0


@pytest.fixture
def client(target: Any) -> Iterator[OpenAI]:
    with OpenAI(base_url=target.url + "/v1", api_key=target.api_key, timeout=TIMEOUT_S, max_retries=0) as found:
        yield found


@pytest.fixture
async def async_client(target: Any) -> AsyncIterator[AsyncOpenAI]:
    options = {"base_url": target.url + "/v1", "api_key": target.api_key, "timeout": TIMEOUT_S, "max_retries": 0}
    async with AsyncOpenAI(**options) as found:
        yield found


@pytest.fixture
def model(target: Any) -> str:
    name: str = target.model
    return name


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


# ---- models ----


def test_models_are_listed_and_retrieved(client: OpenAI, model: str) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.object) == (model, "model")
    assert listed.owned_by
    assert client.models.retrieve(model) == listed


def test_unknown_model_raises_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no-such-model")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=HI)


# ---- chat ----


def test_chat_answer_is_complete(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=HI, max_tokens=8, temperature=0)
    assert (answer.object, answer.model) == ("chat.completion", model)
    assert abs(answer.created - time.time()) < 3600
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content
    assert choice.message.refusal is None
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer._request_id


def test_chat_stream_equals_the_answer(client: OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=HI, max_tokens=16, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=HI,
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_helper_rebuilds_the_answer(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=HI, max_tokens=8, temperature=0) as stream:
        kinds = {event.type for event in stream}
        snapshot = stream.current_completion_snapshot
    assert {"chunk", "content.delta"} <= kinds
    whole = client.chat.completions.create(model=model, messages=HI, max_tokens=8, temperature=0)
    assert snapshot.choices[0].message.content == whole.choices[0].message.content


def test_choices_differ_in_number_only(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=HI, max_tokens=4, n=3, temperature=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    again = client.chat.completions.create(model=model, messages=HI, max_tokens=4, n=3, temperature=1, seed=5)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def test_text_ends_at_a_stop_string(client: OpenAI, model: str) -> None:
    request: dict[str, Any] = {"model": model, "messages": HI, "max_tokens": 24, "temperature": 0}
    full = client.chat.completions.create(**request).choices[0].message.content
    assert full is not None
    stop = full[len(full) // 2 :][:3]
    choice = client.chat.completions.create(**request, stop=[stop]).choices[0]
    assert choice.message.content == full[: full.index(stop)]
    assert choice.finish_reason == "stop"
    assert text_of(list(client.chat.completions.create(**request, stop=stop, stream=True))) == choice.message.content


def test_logprobs_name_every_token(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=HI, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 4
    for entry in content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= 0
        assert entry.bytes is not None


def test_messages_of_every_role_are_taken(client: OpenAI, model: str) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "And again?", "name": "bob"},
    ]
    assert client.chat.completions.create(model=model, messages=messages, max_tokens=2).choices


def test_own_answer_can_be_sent_back(client: OpenAI, model: str) -> None:
    said = client.chat.completions.create(model=model, messages=HI, max_tokens=4).choices[0].message
    replayed: list[Any] = [*HI, said, said.model_dump(), {"role": "user", "content": "Go on."}]
    assert client.chat.completions.create(model=model, messages=replayed, max_tokens=2).choices


def test_hints_are_accepted(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=HI,
        max_tokens=2,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        reasoning_effort="low",
        verbosity="low",
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        parallel_tool_calls=True,
        modalities=["text"],
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "chat_template_kwargs": {"x": 1}},
    )
    assert answer.choices


# ---- completions ----


def test_completion_stream_equals_the_answer(client: OpenAI, model: str) -> None:
    request: dict[str, Any] = {
        "model": model,
        "prompt": ["Once upon a time", "One two"],
        "max_tokens": 6,
        "temperature": 0,
    }
    whole = client.completions.create(**request)
    assert whole.object == "text_completion"
    assert [choice.index for choice in whole.choices] == [0, 1]
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        pieces = [c.text for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(pieces) == choice.text
    # All but what was found: the second time that is more.
    counts = {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.model_dump(include=counts) == whole.usage.model_dump(include=counts)


def test_completion_echoes_and_explains(client: OpenAI, model: str) -> None:
    echoed = client.completions.create(model=model, prompt="Once upon", max_tokens=3, echo=True)
    assert echoed.choices[0].text.startswith("Once upon")
    explained = client.completions.create(model=model, prompt="Once upon", max_tokens=3, logprobs=2, temperature=0)
    logprobs = explained.choices[0].logprobs
    assert logprobs is not None
    lists = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    assert [len(values or ()) for values in lists] == [3, 3, 3, 3]


# ---- errors ----


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"temperature": 5}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"stream": True, "messages": [{"role": "x", "content": "y"}]}, "messages.0.role"),
    ],
)
def test_bad_request_names_the_field(client: OpenAI, model: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": model, "messages": HI, **fields})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert param.split(".", maxsplit=1)[0] in str(caught.value.body)


def test_too_long_prompt_is_a_context_error(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "word " * 100_000}])
    assert caught.value.code == "context_length_exceeded"


def test_wrong_key_raises_authentication_error(client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


# ---- many at once ----


@pytest.mark.anyio
async def test_concurrent_streams_do_not_mix(async_client: AsyncOpenAI, model: str) -> None:
    async def told(number: int) -> str:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": f"Tell me story {number}."}]
        stream = await async_client.chat.completions.create(
            model=model, messages=messages, max_tokens=12, temperature=0, stream=True
        )
        return text_of([chunk async for chunk in stream])

    alone = [await told(number) for number in range(4)]
    together = await asyncio.gather(*(told(number % 4) for number in range(12)))
    assert together == alone * 3


@pytest.mark.anyio
async def test_server_answers_after_a_stream_was_left(async_client: AsyncOpenAI, model: str) -> None:
    stream = await async_client.chat.completions.create(model=model, messages=HI, max_tokens=500, stream=True)
    async for _ in stream:
        break
    await stream.close()
    answer = await async_client.chat.completions.create(model=model, messages=HI, max_tokens=2, temperature=0)
    assert answer.choices[0].finish_reason == "length"
