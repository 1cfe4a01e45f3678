"""/v1/messages: Anthropic's dialect."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.disconnect import while_connected
from vllm_mlx.api.edits import edited
from vllm_mlx.api.generate import admitted, delivered
from vllm_mlx.api.limits import read_body
from vllm_mlx.api.messages import MessageRun
from vllm_mlx.api.observe import RequestRecord, record_of
from vllm_mlx.api.openapi import json_answers, json_body
from vllm_mlx.api.sealed import Sealer
from vllm_mlx.api.tenant import tenant_of
from vllm_mlx.api.wire.anthropic.answers import (
    EditsAnswer,
    ErrorAnswer,
    MessageAnswer,
    OriginalCount,
    TokenCount,
)
from vllm_mlx.api.wire.anthropic.body import CountTokensBody, MessagesBody, PromptFields
from vllm_mlx.api.wire.anthropic.encoder import MessageEncoder
from vllm_mlx.api.wire.anthropic.request import in_own_names, message_request, prompt_request, shown_reasoning
from vllm_mlx.api.wire.anthropic.texts import ReadPdf
from vllm_mlx.api.wire.anthropic.transcript import has_files
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.chat.pdf import PdfTexts
from vllm_mlx.core.chat import ChatRequest
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.kept import Kept
from vllm_mlx.core.sampling import SamplingParams

Body = TypeVar("Body", bound=PromptFields)
MAX_COUNTS = 512
"""Token counts that are remembered, by the whole body: clients count the parts of a prompt again and again."""


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Messages"])
    counts: Kept[bytes, TokenCount] = Kept(MAX_COUNTS)
    read_pdf = PdfTexts().text

    @routes.post(
        "/v1/messages",
        openapi_extra=json_body(MessagesBody),
        responses=json_answers(MessageAnswer, is_streamed=True, error=ErrorAnswer),
        response_class=Response,
    )
    async def create_message(request: Request) -> Response:
        """Continue a conversation."""
        body, record = await admitted(request, MessagesBody, context)
        tenant = tenant_of(request, context.config)
        answered = _answered(body, record, context, tenant=tenant, read_pdf=read_pdf)
        return await while_connected(request.receive, answered)

    @routes.post(
        "/v1/messages/count_tokens",
        openapi_extra=json_body(CountTokensBody),
        responses=json_answers(TokenCount, error=ErrorAnswer),
        response_class=Response,
    )
    async def count_tokens(request: Request) -> Response:
        """Count the tokens of a prompt; nothing is generated."""
        data = await read_body(request, max_mb=context.config.max_body_mb)
        key = hashlib.sha256(data).digest()
        answer = counts.get(key)
        if answer is None:
            body = decode(data, CountTokensBody)
            context.check_model(body.model)
            answer = await _count(body, context, request_id=f"msg_{record_of(request.scope).key}", read_pdf=read_pdf)
            counts.add(key, answer)
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return routes


async def _answered(
    body: MessagesBody, record: RequestRecord, context: Context, *, tenant: bytes, read_pdf: ReadPdf
) -> Response:
    message_id, sealer = f"msg_{record.key}", Sealer(context.responses.key)
    read = partial(
        message_request,
        request_id=message_id,
        defaults=context.service.sampling_defaults,
        unseal=sealer.find,
        read_pdf=read_pdf,
        tenant=tenant,
    )
    asked = await _read(read, body)
    edits: EditsAnswer | msgspec.UnsetType = msgspec.UNSET
    try:
        if body.context_management is not None:
            asked, edits = await edited(context.service, asked, body.context_management)
        events = await context.service.chat(asked)
    except InvalidRequest as error:
        raise in_own_names(error) from error
    shown = shown_reasoning(body)
    encoder = MessageEncoder(
        message_id,
        context.config.model_name,
        max_tokens=body.max_tokens,
        sign=sealer.seal if shown == "signature" else sealer.sign,
        shows=shown,
        edits=edits,
    )
    run = MessageRun(events, encoder, record=record, context=context)
    return await delivered(
        events, context, is_stream=record.is_stream, whole=run.whole, frames=run.stream, sign=run.sign
    )


async def _count(body: CountTokensBody, context: Context, *, request_id: str, read_pdf: ReadPdf) -> TokenCount:
    unseal, service = Sealer(context.responses.key).find, context.service
    read = partial(prompt_request, request_id=request_id, sampling=SamplingParams(), unseal=unseal, read_pdf=read_pdf)
    asked = await _read(read, body)
    try:
        if body.context_management is not None:
            asked, edits = await edited(service, asked, body.context_management)
            num_tokens = await service.count_tokens(asked)
            cleared = sum(edit.cleared_input_tokens for edit in edits.applied_edits)
            return TokenCount(num_tokens, OriginalCount(num_tokens + cleared))
        return TokenCount(await service.count_tokens(asked))
    except InvalidRequest as error:
        raise in_own_names(error) from error


async def _read(read: Callable[[Body], ChatRequest], body: Body) -> ChatRequest:
    """What `read` makes of a body; files are read on a thread."""
    return await asyncio.to_thread(read, body) if has_files(body.messages) else read(body)
