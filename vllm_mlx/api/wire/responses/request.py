"""From the body of a response to a chat request, and to the response before anything of it is written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_mlx.api.wire.chat_completions import served_tier, tier_priority
from vllm_mlx.api.wire.responses.answers import ConversationRef, ResponseAnswer
from vllm_mlx.api.wire.responses.body import (
    ENCRYPTED,
    LOGPROBS,
    JsonObjectFormat,
    JsonSchemaFormat,
    PromptFields,
    ResponsesBody,
)
from vllm_mlx.api.wire.responses.items import ItemReference, MessageInput, ResolvedItem
from vllm_mlx.api.wire.responses.tools import OfferedTools, offered_tools, tool_choice
from vllm_mlx.api.wire.responses.transcript import Unseal, messages_of
from vllm_mlx.core.chat import ChatRequest
from vllm_mlx.core.errors import ContextLengthExceeded, InvalidRequest
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.shape import OutputShape

_OWN_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "logprobs": "top_logprobs", "n": "input"}


def check(body: ResponsesBody) -> None:
    """Raise InvalidRequest for fields that contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
    if body.background and body.store is False:
        raise InvalidRequest("background needs store: nothing else could be asked for.", param="background")
    check_prompt(body)


def check_prompt(body: PromptFields) -> None:
    """Raise InvalidRequest if it is not clear what the prompt is."""
    if body.previous_response_id is not None and body.conversation is not None:
        message = "previous_response_id and conversation both say what came before; send one of them."
        raise InvalidRequest(message, param="previous_response_id")
    has_earlier = body.previous_response_id is not None or body.conversation is not None
    if body.input is None and not has_earlier:
        raise InvalidRequest("input is required.", param="input", code="missing_required_parameter")
    if body.input in ("", []) and not has_earlier and not body.instructions:
        raise InvalidRequest("input is empty.", param="input")


def given_items(body: PromptFields) -> Sequence[ResolvedItem | ItemReference]:
    """The items of the input; a text is a message of the user."""
    if body.input is None:
        return []
    return [MessageInput(role="user", content=body.input)] if isinstance(body.input, str) else body.input


def prompt_request(
    body: PromptFields,
    items: Sequence[ResolvedItem],
    *,
    request_id: str,
    sampling: SamplingParams,
    unseal: Unseal,
    tenant: bytes = b"",
) -> tuple[ChatRequest, OfferedTools]:
    """The conversation of `items`, earlier ones first, in no dialect. Raises InvalidRequest."""
    offered = offered_tools(body.tools or [])
    messages = messages_of(items, instructions=body.instructions, unseal=unseal)
    if not messages:
        raise InvalidRequest("input is empty.", param="input")
    parallel = body.parallel_tool_calls
    request = ChatRequest(
        request_id=request_id,
        messages=messages,
        sampling=sampling,
        tools=offered.tools,
        tool_choice=tool_choice(body.tool_choice, offered),
        parallel_tool_calls=True if parallel is None else parallel,
        output=_shape(body),
        template_kwargs=_template_kwargs(body),
        tenant=tenant,
    )
    return request, offered


def sampling_of(body: ResponsesBody, defaults: Mapping[str, Any]) -> SamplingParams:
    """How tokens are chosen. Raises InvalidRequest, in the names of this dialect."""
    wants_logprobs = body.top_logprobs is not None or LOGPROBS in (body.include or ())
    logprobs = (body.top_logprobs or 0) if wants_logprobs else None
    return body.sampling(defaults, max_tokens=body.max_output_tokens, logprobs=logprobs)


def priority_of(body: ResponsesBody) -> int:
    """How urgent it is; higher goes first."""
    return tier_priority(body.service_tier) - (body.priority or 0)


def wants_sealed(body: ResponsesBody) -> bool:
    """Whether reasoning comes with the blob that a client without stored responses sends back."""
    return ENCRYPTED in (body.include or ())


def answer_head(body: ResponsesBody, sampling: SamplingParams, *, response_id: str, model: str) -> ResponseAnswer:
    """The response before anything of it is written: what was asked for."""
    shown = body.model_dump(mode="json", exclude_unset=True, by_alias=True, include={"tools", "tool_choice", "text"})
    effort = body.reasoning.effort if body.reasoning else None
    summary = (body.reasoning.summary or body.reasoning.generate_summary) if body.reasoning else None
    conversation_id = body.conversation_id
    return ResponseAnswer(
        id=response_id,
        created_at=int(time.time()),
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        model=model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        conversation=None if conversation_id is None else ConversationRef(conversation_id),
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": effort, "summary": summary},
        safety_identifier=body.safety_identifier,
        service_tier=served_tier(body.service_tier),
        store=body.store is not False,
        temperature=sampling.temperature,
        text={"format": {"type": "text"}} | (shown.get("text") or {}),
        tool_choice=shown.get("tool_choice") or "auto",
        tools=shown.get("tools") or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
        metadata=body.metadata or {},
    )


def in_own_names(error: InvalidRequest) -> InvalidRequest:
    """An error of the chat service with this dialect's names of fields."""
    param = _OWN_NAMES.get(error.param or "", error.param)
    message = error.message.replace("max_tokens", "max_output_tokens").replace("the messages", "the input")
    kind = ContextLengthExceeded if isinstance(error, ContextLengthExceeded) else InvalidRequest
    return kind(message, param=param, code=error.code)


def _shape(body: PromptFields) -> OutputShape | None:
    wanted = body.text.format if body.text else None
    if isinstance(wanted, JsonObjectFormat):
        return OutputShape("json_object", param="text.format")
    if isinstance(wanted, JsonSchemaFormat):
        is_strict = wanted.strict is not False
        return OutputShape("json_schema", wanted.schema_, param="text.format.schema", is_strict=is_strict)
    return None


def _template_kwargs(body: PromptFields) -> dict[str, Any]:
    effort = body.reasoning.effort if body.reasoning else None
    named = {
        "reasoning_effort": effort,
        "enable_thinking": False if effort == "none" else None,
        "verbosity": body.text.verbosity if body.text else None,
    }
    return {name: value for name, value in named.items() if value is not None} | (body.chat_template_kwargs or {})
