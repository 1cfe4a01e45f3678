"""What a request would become, and how its tokens and output are read. Nothing is computed."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.limits import read_body
from vllm_mlx.api.observe import record_of
from vllm_mlx.api.openapi import json_answers, json_body
from vllm_mlx.api.tenant import tenant_of
from vllm_mlx.api.wire.chat_completions import ChatCompletionBody, chat_request
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.api.wire.parse import ParseAnswer, ParseBody, parse
from vllm_mlx.api.wire.render import RenderAnswer, render_answer
from vllm_mlx.api.wire.tokenize import (
    DetokenizeAnswer,
    DetokenizeBody,
    TokenizeAnswer,
    TokenizeChatBody,
    TokenizerInfo,
    TokenizeTextBody,
)
from vllm_mlx.chat.service import Rendered

_LONG_TEXT = 20_000
"""Characters, or tokens, from which reading leaves the event loop."""


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Inspect"])

    @routes.post(
        "/tokenize",
        openapi_extra=json_body(TokenizeTextBody, TokenizeChatBody),
        responses=json_answers(TokenizeAnswer),
        response_class=Response,
    )
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a conversation."""
        raw = await read_body(request, max_mb=context.config.max_body_mb)
        return _json(await _tokenize(request, raw, context))

    @routes.post(
        "/detokenize",
        openapi_extra=json_body(DetokenizeBody),
        responses=json_answers(DetokenizeAnswer),
        response_class=Response,
    )
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        body = decode(await read_body(request, max_mb=context.config.max_body_mb), DetokenizeBody)
        context.check_model(body.model)
        if len(body.tokens) < _LONG_TEXT:
            return _json(DetokenizeAnswer(context.service.detokenize(body.tokens)))
        return _json(DetokenizeAnswer(await asyncio.to_thread(context.service.detokenize, body.tokens)))

    @routes.get("/tokenizer_info", responses=json_answers(TokenizerInfo), response_class=Response)
    async def tokenizer_info() -> Response:
        """The tokenizer's special tokens and chat template."""
        return _json(_tokenizer_info(context))

    @routes.post(
        "/v1/chat/render",
        openapi_extra=json_body(ChatCompletionBody),
        responses=json_answers(RenderAnswer),
        response_class=Response,
    )
    async def render_chat(request: Request) -> Response:
        """For the body of a chat request: the exact prompt, and how the output would be read."""
        raw = await read_body(request, max_mb=context.config.max_body_mb)
        return _json(render_answer(await _rendered(request, decode(raw, ChatCompletionBody), context)))

    @routes.post(
        "/v1/parse",
        openapi_extra=json_body(ParseBody),
        responses=json_answers(ParseAnswer),
        response_class=Response,
    )
    async def parse_output(request: Request) -> Response:
        """Read a given text as the output of a model: reasoning, answer, tool calls."""
        raw = await read_body(request, max_mb=context.config.max_body_mb)
        body = decode(raw, ParseBody)
        if len(raw) < _LONG_TEXT:
            return _json(parse(body, context.service.formats))
        return _json(await asyncio.to_thread(parse, body, context.service.formats))

    return routes


def _tokenizer_info(context: Context) -> TokenizerInfo:
    service = context.service
    tokens = {name: service.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    return TokenizerInfo(**tokens, chat_template=service.chat_template, model_max_length=service.max_model_len)


async def _tokenize(request: Request, raw: bytes, context: Context) -> TokenizeAnswer:
    service = context.service
    if _has_messages(raw):
        chat = decode(raw, TokenizeChatBody)
        rendered = await _rendered(request, chat.as_chat(), context, model=chat.model)
        ids, wants_texts = rendered.token_ids, chat.return_token_strs
        if chat.add_special_tokens:
            ids = await service.tokenize(rendered.text, add_special_tokens=True)
    else:
        body = decode(raw, TokenizeTextBody)
        context.check_model(body.model)
        ids = await service.tokenize(body.prompt, add_special_tokens=body.add_special_tokens)
        wants_texts = body.return_token_strs
    texts = [service.token_text(i) for i in ids] if wants_texts else None
    return TokenizeAnswer(len(ids), service.max_model_len, list(ids), texts)


def _has_messages(raw: bytes) -> bool:
    try:
        return "messages" in msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return False  # what is wrong with it is told by the decoder of texts


async def _rendered(
    request: Request, body: ChatCompletionBody, context: Context, *, model: str | None = None
) -> Rendered:
    context.check_model(model or body.model)
    asked = chat_request(
        body,
        request_id=f"render-{record_of(request.scope).key}",
        defaults=context.service.sampling_defaults,
        tenant=tenant_of(request, context.config),
    )
    return await context.service.render(asked)


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
