"""Every field of generating endpoints, OpenAI's and Anthropic's, is taken, or refused by its name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from vllm_mlx.api.wire.anthropic.body import CountTokensBody, MessagesBody
from vllm_mlx.api.wire.chat_completions import ChatCompletionBody
from vllm_mlx.api.wire.completions import CompletionBody
from vllm_mlx.api.wire.responses.body import ResponsesBody

pytestmark = pytest.mark.anyio

FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SHARED: dict[str, Any] = {
    "model": "default",
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"7": 1},
    "allowed_token_ids": [5, 6, 7],
    "bad_words": ["x"],
    "seed": 3,
    "max_tokens": 2,
    "min_tokens": 1,
    "ignore_eos": True,
    "stop": ["x"],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "stop_token_ids": [5],
    "prompt_logprobs": 1,
    "timeout": 30,
    "priority": 1,
    "cache_report": True,
    "user": "u",
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "[a-z]+"},
    "guided_json": SCHEMA,
    "guided_regex": "[a-z]+",
    "guided_choice": ["yes", "no"],
    "guided_grammar": 'start: "a"+',
}
HINTS: dict[str, Any] = {
    "metadata": {"a": "b"},
    "service_tier": "default",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {},
    "safety_identifier": "s",
}
CHAT: dict[str, Any] = {
    **SHARED,
    **HINTS,
    "messages": [{"role": "user", "content": "Hello"}],
    "max_completion_tokens": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "chat_template_kwargs": {"enable_thinking": False},
    "reasoning_effort": "low",
    "enable_thinking": False,
    "thinking_token_budget": 5,
    "modalities": ["text"],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "return_token_ids": True,
    "include_reasoning": False,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "store": False,
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
}
COMPLETION: dict[str, Any] = {**SHARED, "prompt": "Hello", "echo": True, "logprobs": 1, "best_of": 3, "suffix": "x"}
RESPONSES: dict[str, Any] = {
    **{name: value for name, value in SHARED.items() if name in ResponsesBody.model_fields},
    **HINTS,
    "stream_options": {"include_obfuscation": False},
    "input": "Hello",
    "instructions": "Be brief.",
    "previous_response_id": None,
    "conversation": None,
    "tools": [{"type": "function", **FUNCTION}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "low"},
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "truncation": "disabled",
    "chat_template_kwargs": {"enable_thinking": False},
    "max_output_tokens": 16,
    "thinking_token_budget": 5,
    "max_tool_calls": 1,
    "top_logprobs": 1,
    "include": ["reasoning.encrypted_content"],
    "store": False,
    "background": False,
    "client_metadata": {"a": "b"},
    "context_management": None,
}
MESSAGES: dict[str, Any] = {
    **{name: value for name, value in SHARED.items() if name in MessagesBody.model_fields},
    "messages": CHAT["messages"],
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
    "max_tokens": 2,
    "tools": [{"name": "f", "input_schema": FUNCTION["parameters"]}],
    "tool_choice": {"type": "none"},
    "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "summarized"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    "output_format": {"type": "json_schema", "schema": SCHEMA},
    "cache_control": {"type": "ephemeral"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "mcp_servers": [],
    "speed": "standard",
    "chat_template_kwargs": {"enable_thinking": False},
    "stop_sequences": ["x"],
    "metadata": {"user_id": "u"},
    "service_tier": "auto",
    "diagnostics": {"previous_message_id": None},
}
BODIES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletionBody, CHAT, {"messages": CHAT["messages"], "max_tokens": 2}),
    "/v1/completions": (CompletionBody, COMPLETION, {"prompt": "Hello", "max_tokens": 2}),
    "/v1/messages": (MessagesBody, MESSAGES, {"messages": CHAT["messages"], "max_tokens": 2}),
    "/v1/messages/count_tokens": (CountTokensBody, MESSAGES, {"messages": CHAT["messages"]}),
    "/v1/responses": (ResponsesBody, RESPONSES, {"input": "Hello", "max_output_tokens": 16}),
}
TOGETHER: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": CHAT["tools"]},
    "continue_final_message": {
        "messages": [*CHAT["messages"], {"role": "assistant", "content": "He"}],
        "add_generation_prompt": False,
    },
    "best_of": {"n": 2},
}
"""What a field needs besides, in chat completions and completions."""
NEEDS_MORE = {"suffix"}
"""Fields that this model cannot serve: it was not taught to fill in."""


def names(answer: httpx.Response, field: str) -> bool:
    """Whether an error is about a field: Anthropic's have no place for it but the message."""
    error = answer.json()["error"]
    return bool(error["param"] == field if "param" in error else field in error["message"])


def is_refused(body: Any, name: str) -> bool:
    return body.model_fields[name].annotation is type(None)


@pytest.mark.parametrize("path", BODIES)
def test_every_field_has_a_sample(path: str) -> None:
    body, samples, _ = BODIES[path]
    fields = {name for name in body.model_fields if not is_refused(body, name)}
    assert fields - set(samples) == set()


HONOURED = [(path, name) for path, (body, _, _) in BODIES.items() for name in body.model_fields]


@pytest.mark.parametrize(("path", "name"), [each for each in HONOURED if not is_refused(BODIES[each[0]][0], each[1])])
async def test_field_is_taken(path: str, name: str, client: httpx.AsyncClient) -> None:
    _, samples, base = BODIES[path]
    is_openai = path in ("/v1/chat/completions", "/v1/completions")
    more = TOGETHER.get(name, {}) if is_openai else {"stream": True} if name == "stream_options" else {}
    sent = {**base, **more, name: samples[name]}
    if name == "max_completion_tokens":
        del sent["max_tokens"]
    if name == "tool_choice" and path == "/v1/responses":
        sent["tools"] = samples["tools"]
    answer = await client.post(path, json=sent)
    if name in NEEDS_MORE:
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name
    else:
        assert answer.status_code == 200, answer.text
        assert '"error":{' not in answer.text


@pytest.mark.parametrize(("path", "name"), [each for each in HONOURED if is_refused(BODIES[each[0]][0], each[1])])
async def test_field_is_refused_by_name(path: str, name: str, client: httpx.AsyncClient) -> None:
    answer = await client.post(path, json={**BODIES[path][2], name: {"a": 1}})
    assert answer.status_code == 400
    assert names(answer, name)


@pytest.mark.parametrize("path", BODIES)
async def test_field_that_nobody_knows_is_refused_by_name(path: str, client: httpx.AsyncClient) -> None:
    answer = await client.post(path, json={**BODIES[path][2], "no_such_field": 1})
    assert answer.status_code == 400
    assert names(answer, "no_such_field")
