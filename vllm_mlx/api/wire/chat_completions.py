"""Body of POST /v1/chat/completions (https://platform.openai.com/docs/api-reference/chat/create)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_mlx.api.wire.base import WireModel, unsupported
from vllm_mlx.api.wire.constraints import ShapeFields
from vllm_mlx.api.wire.messages import Content, WireMessage, to_message
from vllm_mlx.api.wire.sampling import GenerationBody
from vllm_mlx.api.wire.tools import WireToolChoice, WireTools, to_choice, to_tools
from vllm_mlx.core.chat import ChatRequest
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.sampling import MAX_TOP_LOGPROBS

ServiceTier = Literal["auto", "default", "flex", "scale", "priority"]
_TIER_PRIORITY = MappingProxyType({"flex": -(1 << 24), "priority": 1 << 24})
"""Further apart than any numbers that clients may send, and still above work in the background."""
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _not_stored(value: Any) -> Any:
    if value is True:
        raise unsupported("cannot be true: answers are not stored")
    return value


class Prediction(WireModel):
    """What the answer will probably look like."""

    type: Literal["content"]
    """Only `content`."""
    content: Content
    """Text, or a list of text parts."""


class ChatCompletionBody(ShapeFields, GenerationBody):
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
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None
    """Most tokens of reasoning: then it is closed with a sentence, and the answer begins. 0: none at all."""
    modalities: list[Literal["text"]] | None = None
    """Only `["text"]`."""
    tools: WireTools | None = None
    """Functions and custom tools that the model may call."""
    tool_choice: WireToolChoice | None = None
    """`auto`: the model decides; `none`: it is not told of the tools; `required`; a tool; or `allowed_tools`."""
    parallel_tool_calls: bool | None = None
    """False: the answer ends after its first call."""
    return_token_ids: bool | None = None
    """Return the token ids of the prompt, and of each choice; a stream has them in each choice's last chunk."""
    include_reasoning: bool | None = None
    """False leaves the model's reasoning out of the answer; it is counted all the same."""
    add_generation_prompt: bool | None = None
    """False: the prompt ends with the last message, without the beginning of an answer."""
    continue_final_message: bool | None = None
    """Go on with the last message, which must be the assistant's."""
    metadata: dict[str, str] | None = None
    """Accepted; not used."""
    store: Annotated[Literal[False], BeforeValidator(_not_stored)] | None = None
    """Only false: answers are not stored."""
    service_tier: ServiceTier | None = None
    """`priority` goes before `default`, `flex` after it; `priority`, the number, decides among equals of a tier."""
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
    prediction: Prediction | None = None
    """Accepted as a hint; not used."""
    web_search_options: None = None
    """The server does not search the web."""
    moderation: None = None
    """The server does not moderate."""


def chat_request(
    body: ChatCompletionBody, *, request_id: str, defaults: Mapping[str, Any], tenant: bytes = b""
) -> ChatRequest:
    """The same request in no dialect. Raises InvalidRequest for fields that contradict each other."""
    body.check_stream_options()
    if body.add_generation_prompt and body.continue_final_message:
        message = "continue_final_message and add_generation_prompt exclude each other; send one of them."
        raise InvalidRequest(message, param="continue_final_message")
    tools = to_tools(body.tools)
    return ChatRequest(
        request_id=request_id,
        messages=tuple(to_message(wire, position=i) for i, wire in enumerate(body.messages)),
        sampling=body.sampling(defaults, max_tokens=_max_tokens(body), logprobs=_logprobs(body)),
        tools=tools,
        tool_choice=to_choice(body.tool_choice, tools),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        thinking_budget=body.thinking_token_budget,
        output=body.shape(),
        template_kwargs=_template_kwargs(body),
        timeout_s=body.timeout,
        tenant=tenant,
        wants_cache_report=bool(body.cache_report),
        priority=tier_priority(body.service_tier) - (body.priority or 0),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        wants_token_ids=bool(body.return_token_ids),
    )


def tier_priority(tier: str | None) -> int:
    """The priority that a service tier stands for; higher goes first."""
    return _TIER_PRIORITY.get(tier or "default", 0)


def served_tier(tier: str | None) -> str:
    """The tier that the answer names."""
    return tier if tier is not None and tier in _TIER_PRIORITY else "default"


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
