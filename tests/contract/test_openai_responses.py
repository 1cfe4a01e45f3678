"""OpenAI's own Python client and the Responses API. Nothing here depends on what the model says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

HI = "Count from 1 to 200."
TIMEOUT_S = 120.0


@pytest.fixture
def client(target: Any) -> Iterator[OpenAI]:
    with OpenAI(base_url=target.url + "/v1", api_key=target.api_key, timeout=TIMEOUT_S, max_retries=0) as found:
        yield found


@pytest.fixture
def model(target: Any) -> str:
    name: str = target.model
    return name


def test_a_response_is_made_kept_and_deleted(client: OpenAI, model: str) -> None:
    made = client.responses.create(model=model, input=HI, max_output_tokens=8, temperature=0)
    assert (made.object, made.model, made.status) == ("response", model, "incomplete")
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.output_text
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert made.usage.output_tokens == 8
    found = client.responses.retrieve(made.id)
    assert found.output_text == made.output_text
    (item,) = client.responses.input_items.list(made.id).data
    assert item.type == "message"
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_stream_ends_with_the_response(client: OpenAI, model: str) -> None:
    with client.responses.stream(model=model, input=HI, max_output_tokens=8, temperature=0) as stream:
        events = list(stream)
    last = events[-1]
    assert last.type == "response.incomplete"
    final = last.response
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert final.output_text == "".join(deltas)
    assert final.usage is not None
    assert final.usage.output_tokens == 8


def test_a_plain_stream_numbers_its_events(client: OpenAI, model: str) -> None:
    events = list(client.responses.create(model=model, input=HI, max_output_tokens=8, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"


def test_a_response_goes_on_from_another(client: OpenAI, model: str) -> None:
    first = client.responses.create(model=model, input=HI, max_output_tokens=8)
    second = client.responses.create(model=model, input="more", previous_response_id=first.id, max_output_tokens=8)
    assert second.previous_response_id == first.id
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=model, input=HI, previous_response_id="resp_nope")


class Verdict(BaseModel):
    ok: bool
    kind: Literal["river", "lake"]


def test_an_answer_has_the_shape_that_was_asked_for(client: OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"input": HI, "text_format": Verdict, "max_output_tokens": 100, "temperature": 0}
    made = client.responses.parse(model=model, **asked)
    assert made.status == "completed"
    assert isinstance(made.output_parsed, Verdict)
    with client.responses.stream(model=model, **asked) as stream:
        list(stream)
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Verdict)


def test_input_tokens_are_counted(client: OpenAI, model: str) -> None:
    made = client.responses.create(model=model, input=HI, max_output_tokens=8)
    assert made.usage is not None
    assert client.responses.input_tokens.count(model=model, input=HI).input_tokens == made.usage.input_tokens


def test_a_background_response_is_polled_and_cancelled(client: OpenAI, model: str) -> None:
    made = client.responses.create(model=model, input=HI, max_output_tokens=400, background=True)
    assert made.status == "queued"
    ended = client.responses.cancel(made.id)
    assert ended.status in ("cancelled", "incomplete", "completed")  # the model may have been faster
    assert client.responses.retrieve(made.id).status == ended.status
    events = list(client.responses.retrieve(made.id, stream=True))
    assert events[0].type == "response.created"


def test_what_is_not_offered_is_a_bad_request(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(
            model=model, input=HI, tools=[{"type": "code_interpreter", "container": {"type": "auto"}}]
        )
    assert caught.value.param == "tools.0"


def test_a_conversation_grows_with_its_responses(client: OpenAI, model: str) -> None:
    talk = client.conversations.create(metadata={"a": "b"}, items=[{"role": "user", "content": "first"}])
    assert client.conversations.retrieve(talk.id).metadata == {"a": "b"}
    made = client.responses.create(model=model, input=HI, conversation=talk.id, max_output_tokens=8)
    assert made.conversation is not None
    assert made.conversation.id == talk.id
    items = client.conversations.items.list(talk.id, order="asc").data
    assert [item.type for item in items] == ["message"] * 3
    added = client.conversations.items.create(talk.id, items=[{"role": "user", "content": "more"}]).data
    assert client.conversations.items.retrieve(str(added[0].id), conversation_id=talk.id) == added[0]
    client.conversations.items.delete(str(added[0].id), conversation_id=talk.id)
    assert len(client.conversations.items.list(talk.id).data) == 3
    assert client.conversations.update(talk.id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert client.conversations.delete(talk.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(talk.id)
