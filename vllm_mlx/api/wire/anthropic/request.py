"""From a body to a chat request."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from vllm_mlx.api.wire.anthropic.body import (
    DisabledThinking,
    EnabledThinking,
    JsonFormat,
    MessagesBody,
    PromptFields,
)
from vllm_mlx.api.wire.anthropic.cache_control import keep_s
from vllm_mlx.api.wire.anthropic.encoder import Shown
from vllm_mlx.api.wire.anthropic.offer import offer_of
from vllm_mlx.api.wire.anthropic.texts import ReadPdf
from vllm_mlx.api.wire.anthropic.tools import to_choice
from vllm_mlx.api.wire.anthropic.transcript import Unseal, messages_of
from vllm_mlx.chat.pdf import pdf_text
from vllm_mlx.core.chat import ChatRequest, Message
from vllm_mlx.core.errors import ContextLengthExceeded, InvalidRequest, OutputLimitExceeded
from vllm_mlx.core.sampling import SamplingParams, merge
from vllm_mlx.core.shape import OutputShape

_OWN_NAMES = MappingProxyType({"stop": "stop_sequences"})


def prompt_request(
    body: PromptFields,
    *,
    request_id: str,
    sampling: SamplingParams,
    unseal: Unseal,
    read_pdf: ReadPdf = pdf_text,
    tenant: bytes = b"",
) -> ChatRequest:
    """The conversation in no dialect. Raises InvalidRequest for fields that contradict each other."""
    offer = offer_of(body.tools, body.messages)
    tools = tuple(offer.tools.values())
    choice, is_parallel = to_choice(body.tool_choice, tools, seen=offer.seen)
    found = messages_of(body.messages, system=body.system, unseal=unseal, tools=offer.tools, read_pdf=read_pdf)
    messages = _marked(_without_empty_end(found), body)
    last = messages[-1] if messages else None
    if last is None or all(message.role == "system" for message in messages):
        raise InvalidRequest("messages must have a turn of the user.", param="messages")
    if last.role == "assistant" and last.tool_calls and isinstance(body, MessagesBody):
        raise InvalidRequest(
            "messages ends with tool_use blocks: send their tool_result blocks in a turn of the user.", param="messages"
        )
    goes_on = last.role == "assistant" and _says(last) and not last.tool_calls
    shape = _shape(body)
    if goes_on and shape is not None:
        name = shape.param.removesuffix(".schema")
        message = f"{name} describes a whole answer, but messages ends with the beginning of one; leave one out."
        raise InvalidRequest(message, param=name)
    return ChatRequest(
        request_id=request_id,
        messages=messages,
        sampling=sampling,
        tools=tools,
        tool_choice=choice,
        thinking_budget=_budget(body),
        parallel_tool_calls=is_parallel,
        output=shape,
        template_kwargs=_template_kwargs(body),
        tenant=tenant,
        continue_final_message=goes_on,
        output_may_be_shorter=True,
    )


def _without_empty_end(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages without a last turn of the assistant that says nothing: there is nothing to go on with."""
    last = messages[-1] if messages else None
    is_empty = last is not None and last.role == "assistant" and not (last.reasoning or last.tool_calls or _says(last))
    return messages[:-1] if is_empty else messages


def _says(message: Message) -> bool:
    content = message.content or ""
    return any(text.strip() for text in ([content] if isinstance(content, str) else (part.text for part in content)))


def message_request(
    body: MessagesBody,
    *,
    request_id: str,
    defaults: Mapping[str, Any],
    unseal: Unseal,
    read_pdf: ReadPdf = pdf_text,
    tenant: bytes = b"",
) -> ChatRequest:
    """The whole request in no dialect. Raises InvalidRequest, in the names of this dialect."""
    sampling = _sampling(body, defaults)
    request = prompt_request(
        body, request_id=request_id, sampling=sampling, unseal=unseal, read_pdf=read_pdf, tenant=tenant
    )
    return msgspec.structs.replace(
        request,
        timeout_s=body.timeout,
        priority=-(body.priority or 0),
        wants_cache_report=body.diagnostics is not None,
    )


def shown_reasoning(body: PromptFields) -> Shown:
    """What the client wants to see of the reasoning."""
    given = body.thinking
    if isinstance(given, DisabledThinking):
        return "nothing"  # some models think all the same
    return "signature" if given is not None and given.display == "omitted" else "all"


def in_own_names(error: InvalidRequest) -> InvalidRequest:
    """An error of the chat service with this dialect's names of fields.

    Clients know a prompt that is too long by its text, and shorten the conversation; and by its text that they ask for
    too long an answer, and ask for less.
    """
    param = _OWN_NAMES.get(error.param or "", error.param)
    if isinstance(error, ContextLengthExceeded) and error.num_tokens:
        text = f"prompt is too long: {error.num_tokens} tokens > {error.max_tokens} maximum"
        return ContextLengthExceeded(text, param=param, num_tokens=error.num_tokens, max_tokens=error.max_tokens)
    if isinstance(error, OutputLimitExceeded):
        what = "the maximum allowed number of output tokens for this model"
        text = f"max_tokens: {error.num_tokens} > {error.max_tokens}, which is {what}"
        return OutputLimitExceeded(text, param=param, num_tokens=error.num_tokens, max_tokens=error.max_tokens)
    if param == error.param:
        return error
    return InvalidRequest(error.message.replace("stop ", "stop_sequences ", 1), param=param, code=error.code)


def _sampling(body: MessagesBody, defaults: Mapping[str, Any]) -> SamplingParams:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens")
    given = {name: getattr(body, name) for name in names}
    given["stop"] = tuple(body.stop_sequences) if body.stop_sequences else None
    try:
        return merge(given, defaults)
    except InvalidRequest as error:
        raise in_own_names(error) from error


def _marked(messages: tuple[Message, ...], body: PromptFields) -> tuple[Message, ...]:
    """The messages with the marks that stand outside them: tools are shown before them, `cache_control` ends them."""
    found = list(messages)
    tools = max((keep_s(tool.cache_control) for tool in body.tools or ()), default=0)
    for place, seconds in ((0, tools), (-1, keep_s(body.cache_control))):
        if found and seconds:
            keep = max(found[place].keep_s, seconds)
            found[place] = msgspec.structs.replace(found[place], is_breakpoint=True, keep_s=keep)
    return tuple(found)


def _budget(body: PromptFields) -> int | None:
    """Tokens of reasoning. None at all if it is disabled, also for models whose template cannot switch it off."""
    if isinstance(body.thinking, DisabledThinking):
        return 0
    return body.thinking.budget_tokens if isinstance(body.thinking, EnabledThinking) else None


def _shape(body: PromptFields) -> OutputShape | None:
    """What the answer must look like. Raises InvalidRequest if that is said twice."""
    newer = body.output_config.format if body.output_config else None
    given = [("output_config.format", newer), ("output_format", body.output_format)]
    shapes = [_json_shape(name, wanted) for name, wanted in given if wanted is not None]
    other = body.shape() if isinstance(body, MessagesBody) else None
    shapes += [other] if other is not None else []
    if len(shapes) > 1:
        first, second = shapes[0].param.removesuffix(".schema"), shapes[1].param.removesuffix(".schema")
        raise InvalidRequest(f"{first} and {second} exclude each other; send one of them.", param=second)
    return shapes[0] if shapes else None


def _json_shape(name: str, wanted: JsonFormat) -> OutputShape:
    return OutputShape("json_schema", wanted.schema_, param=f"{name}.schema")


def _effort(body: PromptFields) -> str | None:
    """That of the last turn that says one, else that of the whole request."""
    configs = [turn.output_config for turn in reversed(body.messages)]
    return next((found.effort for found in (*configs, body.output_config) if found and found.effort), None)


def _template_kwargs(body: PromptFields) -> dict[str, Any]:
    named = {
        "enable_thinking": None if body.thinking is None else not isinstance(body.thinking, DisabledThinking),
        "reasoning_effort": _effort(body),
    }
    return {name: value for name, value in named.items() if value is not None} | (body.chat_template_kwargs or {})
