"""Bodies become records, or one error that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_mlx.api.batches.background import BACKGROUND_PRIORITY
from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.api.wire.chat_completions import ChatCompletionBody, chat_request
from vllm_mlx.api.wire.completions import CompletionBody, completion_request
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.api.wire.sampling import MAX_PRIORITY
from vllm_mlx.core.chat import ChatRequest, CompletionRequest, Message, TextPart, ToolCall
from vllm_mlx.core.errors import InvalidRequest

HI = [{"role": "user", "content": "hi"}]


def chat(defaults: dict[str, Any] | None = None, /, **fields: Any) -> ChatRequest:
    body = decode(json.dumps({"messages": HI, **fields}).encode(), ChatCompletionBody)
    return chat_request(body, request_id="r", defaults=defaults or {})


def complete(**fields: Any) -> CompletionRequest:
    return completion_request(decode(json.dumps(fields).encode(), CompletionBody), request_id="r", defaults={})


CHAT_ERRORS = [
    ({"messages": "hello"}, "messages", "must be a valid array"),
    ({"messages": []}, "messages", "at least 1 entry"),
    ({"messages": None}, "messages", "must be a valid array"),
    ({"messages": [5]}, "messages.0", "must be an object"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "is required"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'assistant', 'tool'"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "is required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "a valid string or a valid array"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0.type", "is required"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "messages.0.content.0.text",
        "must be a valid string",
    ),
    (
        {"messages": [*HI, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        "messages.1.content.1",
        "takes text only",
    ),
    ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages.0.mood", "Unrecognized field"),
    ({"messages": [{"role": "assistant"}]}, "messages.0.content", "tool_calls"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "is required"),
    ({"temperature": 5}, "temperature", "at most 2"),
    ({"temperature": "1"}, "temperature", "must be a valid number"),
    ({"temperature": True}, "temperature", "not true"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "at least 1"),
    ({"max_tokens": 0}, "max_tokens", "not 0"),
    ({"max_tokens": 1.5}, "max_tokens", "a valid integer"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "greater than or equal to 1"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
    ({"timeout": 0}, "timeout", "greater than 0"),
    ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
    ({"zzz": 1}, "zzz", "Unrecognized field 'zzz'."),
    ({"stop": 5}, "stop", "a valid string or a valid array"),
    ({"stop": ["a", 3]}, "stop.1", "must be a valid string"),
    ({"stop": ["a"] * 17}, "stop", "at most 16 entries"),
    ({"stop": [""]}, "stop", "empty"),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "is required"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "no tools"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "json_object"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name", "required"),
    ({"structured_outputs": {"regex": "a", "backend": "x"}}, "structured_outputs.backend", "Unrecognized"),
    ({"tools": [{"type": "function", "function": {"name": "f"}, "strict": True}]}, "tools.0.strict", "Unrecognized"),
    ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools.0.function.x", "Unrecognized"),
    ({"guided_choice": "a"}, "guided_choice", "array"),
    ({"modalities": ["text", "audio"]}, "modalities.1", "'text'"),
    ({"audio": {"voice": "x"}}, "audio", "not supported"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"prediction": {}}, "prediction.type", "is required"),
    ({"web_search_options": {}}, "web_search_options", "not supported"),
    ({"store": True}, "store", "not stored"),
    ({"service_tier": "best"}, "service_tier", "'auto', 'default', 'flex'"),
    ({"reasoning_effort": "very"}, "reasoning_effort", "'minimal'"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a", "token ids"),
    ({"logit_bias": {"9" * 5000: 1}}, f"logit_bias.{'9' * 40}", "token ids"),
    ({"logit_bias": {"1": 1000}}, "logit_bias.1", "at most 100"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 30}, "top_logprobs", "20"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "Unrecognized field"),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
        "include_usage",
    ),
    ({"seed": 2**70}, "seed", "at most"),
]


@pytest.mark.parametrize(("fields", "param", "text"), CHAT_ERRORS)
def test_chat_error_names_the_field(fields: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert text in caught.value.message


def test_tier_and_number_order_requests_above_the_background() -> None:
    asked = [("priority", 9), ("priority", MAX_PRIORITY), (None, -1), ("auto", 0), ("flex", -MAX_PRIORITY), ("flex", 5)]
    given = [chat(service_tier=tier, priority=number).priority for tier, number in asked]
    assert given == sorted(given, reverse=True)
    assert len(set(given)) == len(given)
    assert min(given) > BACKGROUND_PRIORITY


COMPLETION_ERRORS = [
    ({}, "prompt", "is required"),
    ({"prompt": []}, "prompt", "at least 1 entry"),
    ({"prompt": [[]]}, "prompt.0", "at least 1 entry"),
    ({"prompt": 5}, "prompt", "a valid string or a valid array"),
    ({"prompt": [1, "a"]}, "prompt.0", "must be"),
    ({"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
    ({"prompt": "x", "suffix": "y", "echo": True}, "suffix", "exclude"),
    ({"prompt": "x", "n": 3, "best_of": 2}, "best_of", "at least n"),
    ({"prompt": "x", "best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "echo"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", "20"),
    ({"prompt": "x", "messages": HI}, "messages", "Unrecognized field"),
]


@pytest.mark.parametrize(("fields", "param", "text"), COMPLETION_ERRORS)
def test_completion_error_names_the_field(fields: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        complete(**fields)
    assert caught.value.param == param
    assert text in caught.value.message


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "empty"),
        (b'{"messages": [', "line 1 column 14"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not valid JSON"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        decode(raw, ChatCompletionBody)


def test_error_does_not_repeat_the_text_of_the_caller() -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": {"secret": 1}}]}], temperature="secret")
    assert "secret" not in caught.value.message


def test_null_means_not_given() -> None:
    optional = [name for name, field in ChatCompletionBody.model_fields.items() if not field.is_required()]
    assert chat(**dict.fromkeys(optional)) == chat()


def test_messages_that_openais_client_parsed_are_taken_back() -> None:
    function = {"name": "f", "arguments": '{"a": 1}'}
    said = {"role": "assistant", "content": "{}", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    calls = [{"id": "c", "type": "function", "function": {**function, "parsed_arguments": {"a": 1}}}]
    parsed = {**said, "parsed": {}, "tool_calls": calls}
    assert chat(messages=[*HI, parsed]) == chat(messages=[*HI, said])


def test_harmless_fields_are_accepted() -> None:
    given = chat(
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        verbosity="low",
        parallel_tool_calls=True,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        modalities=["text"],
    )
    assert given == chat()


def test_sampling_fields_arrive() -> None:
    sampling = chat(
        {"temperature": 0.5, "top_p": 0.9},
        temperature=0,
        top_k=5,
        min_p=0.1,
        n=2,
        seed=-3,
        stop="END",
        stop_token_ids=[7, 8],
        max_completion_tokens=9,
        min_tokens=2,
        ignore_eos=True,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=3,
    ).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.9, 5, 0.1)
    assert (sampling.n, sampling.seed, sampling.stop, sampling.stop_token_ids) == (2, -3, ("END",), (7, 8))
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (9, 2, True)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.1)
    assert (sampling.logit_bias, sampling.logprobs) == ({5: -100}, 3)


def test_messages_arrive() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    request = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "bob"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "refusal": None},
            {"role": "tool", "content": "18", "tool_call_id": "c"},
            {"role": "assistant", "refusal": "No."},
        ]
    )
    assert request.messages == (
        Message("system", "Be brief."),
        Message("user", (TextPart("a"), TextPart("b")), "bob"),
        Message("assistant", None, reasoning="hm", tool_calls=(ToolCall("c", "f", "{}"),)),
        Message("tool", "18", tool_call_id="c"),
        Message("assistant", "No."),
    )


def test_template_variables_of_the_request_win() -> None:
    request = chat(reasoning_effort="low", enable_thinking=True, chat_template_kwargs={"enable_thinking": False})
    assert request.template_kwargs == {"reasoning_effort": "low", "enable_thinking": False}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("x", ("x",)), (["x", "y"], ("x", "y")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_prompt_has_four_shapes(prompt: Any, expected: tuple[Any, ...]) -> None:
    assert complete(prompt=prompt).prompts == expected


def test_completion_has_sixteen_tokens_unless_it_says_otherwise() -> None:
    assert complete(prompt="x").sampling.max_tokens == 16
    assert complete(prompt="x", max_tokens=3, n=2, best_of=2).sampling.max_tokens == 3


def models(base: type[WireModel]) -> list[type[WireModel]]:
    return [base, *(found for child in base.__subclasses__() for found in models(child))]


@pytest.mark.parametrize("model", models(WireModel))
def test_every_field_is_described(model: type[WireModel]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_first_wrong_message_ends_the_search_for_more() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionBody.model_validate_json(json.dumps({"messages": [*HI, *[5] * 2000]}))
    assert caught.value.error_count() == 1


def test_wrong_message_among_thousands_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(messages=[*HI, *[5] * 2000])
    assert caught.value.param == "messages.1"


def test_countless_wrong_fields_are_counted_not_listed() -> None:
    with pytest.raises(InvalidRequest, match="2000 wrong or unknown fields"):
        chat(**{f"field_{number}": 1 for number in range(2000)})


def test_cache_control_marks_its_message() -> None:
    part = {"type": "text", "text": "a"}
    marked = {"role": "system", "content": [part, {**part, "cache_control": {"type": "ephemeral"}}]}
    body = decode(json.dumps({"messages": [marked, {"role": "user", "content": [part]}]}).encode(), ChatCompletionBody)
    asked = chat_request(body, request_id="r", defaults={})
    assert [message.is_breakpoint for message in asked.messages] == [True, False]
