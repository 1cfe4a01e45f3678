"""From a body to a run: put the conversation together, submit it, and answer as the client wants."""

from __future__ import annotations

import sqlite3
from collections.abc import Coroutine
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.disconnect import while_connected
from vllm_mlx.api.generate import delivered
from vllm_mlx.api.observe import RequestRecord, new_record
from vllm_mlx.api.responses.background import Background
from vllm_mlx.api.responses.earlier import earlier_items, resolved
from vllm_mlx.api.responses.follow import follow
from vllm_mlx.api.responses.run import Keeper, Run
from vllm_mlx.api.responses.truncation import truncated
from vllm_mlx.api.sealed import Sealer
from vllm_mlx.api.tenant import tenant_of
from vllm_mlx.api.wire.responses.body import InputTokensBody, PromptFields, ResponsesBody
from vllm_mlx.api.wire.responses.encoder import ResponseEncoder
from vllm_mlx.api.wire.responses.items import ResolvedItem
from vllm_mlx.api.wire.responses.request import (
    answer_head,
    check,
    check_prompt,
    given_items,
    in_own_names,
    priority_of,
    prompt_request,
    sampling_of,
    wants_sealed,
)
from vllm_mlx.api.wire.responses.tools import OfferedTools
from vllm_mlx.api.wire.responses.transcript import stored_items
from vllm_mlx.core.chat import ChatRequest
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.sampling import SamplingParams


async def respond(
    request: Request, body: ResponsesBody, record: RequestRecord, *, context: Context, background: Background
) -> Response:
    """Answer with a new response. Raises RequestError; ClientDisconnect when nobody waits any more."""
    tenant = tenant_of(request, context.config)
    if body.background:
        record = new_record(record.request_id)  # the run outlives the request
    starting = _start(body, record, context, tenant=tenant)
    if body.background:
        answering = _alone(starting, context, background, is_stream=bool(body.stream))
    else:
        answering = _with_client(starting, context, is_stream=bool(body.stream))
    return await while_connected(request.receive, answering)


async def count(body: InputTokensBody, context: Context, *, tenant: bytes) -> int:
    """Tokens of a prompt. Raises RequestError."""
    check_prompt(body)
    asked, _, _ = await _asked(body, SamplingParams(), context, response_id="resp_count", tenant=tenant)
    try:
        return await context.service.count_tokens(asked)
    except InvalidRequest as error:
        raise in_own_names(error) from error


async def _start(body: ResponsesBody, record: RequestRecord, context: Context, *, tenant: bytes) -> Run:
    check(body)
    response_id, store = f"resp_{record.key}", context.responses
    try:
        sampling = sampling_of(body, context.service.sampling_defaults)
        asked, offered, new = await _asked(body, sampling, context, response_id=response_id, tenant=tenant)
        asked = msgspec.structs.replace(
            asked,
            timeout_s=body.timeout,
            wants_cache_report=bool(body.cache_report),
            priority=priority_of(body),
            thinking_budget=body.thinking_token_budget,
        )
        if body.truncation == "auto":
            asked = await truncated(context.service, asked)
        events = await context.service.chat(asked)
    except InvalidRequest as error:
        raise in_own_names(error) from error
    encoder = ResponseEncoder(
        answer_head(body, sampling, response_id=response_id, model=context.config.model_name),
        offered=offered,
        has_summary=body.wants_summary,
        seal=Sealer(store.key).seal if wants_sealed(body) else None,
    )
    keeper = Keeper(store, tenant, stored_items(new, key=record.key), body.store is not False, body.conversation_id)
    return Run(events, encoder, keeper, record=record, context=context)


async def _asked(
    body: PromptFields, sampling: SamplingParams, context: Context, *, response_id: str, tenant: bytes
) -> tuple[ChatRequest, OfferedTools, list[ResolvedItem]]:
    """The chat request, its tools, and the items that are new."""
    store = context.responses
    earlier = await earlier_items(store, body, tenant=tenant)
    new = await resolved(store, given_items(body), tenant=tenant)
    asked, offered = prompt_request(
        body,
        [*earlier, *new],
        request_id=response_id,
        sampling=sampling,
        unseal=Sealer(store.key).unseal,
        tenant=tenant,
    )
    return asked, offered, new


async def _with_client(starting: Coroutine[Any, Any, Run], context: Context, *, is_stream: bool) -> Response:
    """The response ends with its client."""
    run = await starting
    return await delivered(run.events, context, is_stream=is_stream, whole=run.whole, frames=run.stream)


async def _alone(
    starting: Coroutine[Any, Any, Run], context: Context, background: Background, *, is_stream: bool
) -> Response:
    """The response goes on whoever is there."""
    run = await starting
    first = run.encoder.answer
    try:
        live = background.start(run)
    except sqlite3.Error:
        await run.events.aclose()
        raise
    if is_stream:
        return follow(live, after=-1, context=context)
    return Response(msgspec.json.encode(first), media_type="application/json")
