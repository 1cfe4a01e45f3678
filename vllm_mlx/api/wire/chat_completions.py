"""Body of POST /v1/chat/completions (https://platform.openai.com/docs/api-reference/chat/create)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_mlx.api.wire.base import WireModel, refuse_unless_empty, unsupported
from vllm_mlx.api.wire.messages import WireMessage, to_message
from vllm_mlx.api.wire.sampling import GenerationBody
from vllm_mlx.core.chat import ChatRequest
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.sampling import MAX_TOP_LOGPROBS

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _text_format(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise unsupported("must be 'text'; other formats are not supported by this server")
    return kind


def _no_forced_tool(choice: Any) -> Any:
    if isinstance(choice, dict) or choice == "required":
        raise unsupported("must be 'none' or 'auto'; tools are not supported by this server")
    return choice


def _not_stored(value: Any) -> Any:
    if value is True:
        raise unsupported("cannot be true: answers are not stored")
    return value


class ResponseFormat(WireModel):
    """Shape of the answer."""

    type: Annotated[Literal["text"], BeforeValidator(_text_format)]
    """Only `text`."""
    json_schema: None = None
    """Belongs to another type."""


class ChatCompletionBody(GenerationBody):
    """A conversation to continue."""

    messages: Annotated[list[WireMessage], Field(min_length=1, fail_fast=True)]
    """The conversation so far, oldest first."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate; the newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Return log-probabilities of the generated tokens."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Also of this many most likely tokens at each position, 0 to 20; needs `logprobs: true`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template; they win over the server's own."""
    reasoning_effort: Effort | None = None
    """Given to the chat template as a variable; templates that do not know it ignore it."""
    enable_thinking: bool | None = None
    """Given to the chat template as a variable; templates that do not know it ignore it."""
    response_format: ResponseFormat | None = None
    """Only `{"type": "text"}`."""
    modalities: list[Literal["text"]] | None = None
    """Only `["text"]`."""
    tools: Annotated[list[Any], BeforeValidator(refuse_unless_empty)] | None = None
    """Only an empty list: tools are not supported."""
    tool_choice: Annotated[Literal["none", "auto"], BeforeValidator(_no_forced_tool)] | None = None
    """Without tools nothing can be chosen: `none` and `auto` are accepted."""
    parallel_tool_calls: bool | None = None
    """Accepted; has no meaning without tools."""
    metadata: dict[str, str] | None = None
    """Accepted; not used."""
    store: Annotated[Literal[False], BeforeValidator(_not_stored)] | None = None
    """Only false: answers are not stored."""
    service_tier: Literal["auto", "default"] | None = None
    """There is one tier: `auto` and `default` are accepted."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Accepted as a hint; not used."""
    prompt_cache_key: str | None = None
    """Accepted; equal prefixes are shared without it."""
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    """Accepted; the server decides how long prefixes are kept."""
    prompt_cache_options: Any = None
    """Accepted; the server decides how long prefixes are kept."""
    safety_identifier: str | None = None
    """Accepted; not used."""
    audio: None = None
    """This model writes text only."""
    functions: None = None
    """Deprecated by OpenAI."""
    function_call: None = None
    """Deprecated by OpenAI."""
    prediction: None = None
    """Predicted outputs are not offered."""
    web_search_options: None = None
    """The server does not search the web."""
    moderation: None = None
    """The server does not moderate."""


def chat_request(
    body: ChatCompletionBody, *, request_id: str, defaults: Mapping[str, Any], tenant: bytes = b""
) -> ChatRequest:
    """The same request in no dialect. Raises InvalidRequest for fields that contradict each other."""
    body.check_stream_options()
    return ChatRequest(
        request_id=request_id,
        messages=tuple(to_message(wire, position=i) for i, wire in enumerate(body.messages)),
        sampling=body.sampling(defaults, max_tokens=_max_tokens(body), logprobs=_logprobs(body)),
        template_kwargs=_template_kwargs(body),
        timeout_s=body.timeout,
        tenant=tenant,
        wants_cache_report=bool(body.cache_report),
    )


def _max_tokens(body: ChatCompletionBody) -> int | None:
    newer, older = body.max_completion_tokens, body.max_tokens
    if newer is not None and older is not None and newer != older:
        message = "max_completion_tokens and max_tokens differ; send one of them."
        raise InvalidRequest(message, param="max_completion_tokens")
    return older if newer is None else newer


def _logprobs(body: ChatCompletionBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs is not None:
        raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
    return None


def _template_kwargs(body: ChatCompletionBody) -> dict[str, Any]:
    named = {"reasoning_effort": body.reasoning_effort, "enable_thinking": body.enable_thinking}
    return {name: value for name, value in named.items() if value is not None} | (body.chat_template_kwargs or {})
