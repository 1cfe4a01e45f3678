"""/v1/cache: warm it, look at it, ask it why, and clear it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.disconnect import while_connected
from vllm_mlx.api.limits import read_body
from vllm_mlx.api.observe import record_of
from vllm_mlx.api.openapi import json_answers, json_body
from vllm_mlx.api.tenant import tenant_of
from vllm_mlx.api.wire.cache import (
    WARM_SAMPLING,
    CacheStatsAnswer,
    ClearedAnswer,
    DiskAnswer,
    ExplainAnswer,
    PagesAnswer,
    WarmAnswer,
    WarmBody,
    WarmedPrompt,
    conversations,
    warm_request,
)
from vllm_mlx.api.wire.chat_completions import ChatCompletionBody, chat_request
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.api.wire.usage import difference_answer
from vllm_mlx.chat.collect import collect
from vllm_mlx.core.chat import ChatRequest
from vllm_mlx.core.messages import DiskStats


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Cache"])

    @routes.post(
        "/v1/cache/warm",
        openapi_extra=json_body(WarmBody, ChatCompletionBody),
        responses=json_answers(WarmAnswer),
        response_class=Response,
    )
    async def warm_cache(request: Request) -> Response:
        """Compute conversations, or the one of a chat request, and keep what is remembered of them in memory."""
        context.lifecycle.admit()
        raw = await read_body(request, max_mb=context.config.max_body_mb)
        asked = _warm_requests(request, raw, context)
        return _json(await while_connected(request.receive, _warm(context, asked)))

    @routes.post(
        "/v1/cache/explain",
        openapi_extra=json_body(ChatCompletionBody),
        responses=json_answers(ExplainAnswer),
        response_class=Response,
    )
    async def explain_cache(request: Request) -> Response:
        """For the body of a chat request: how much of its prompt is remembered, and why not more."""
        raw = await read_body(request, max_mb=context.config.max_body_mb)
        return _json(await _explain(context, _chat_request(request, raw, context)))

    @routes.get("/v1/cache/stats", responses=json_answers(CacheStatsAnswer), response_class=Response)
    async def cache_stats() -> Response:
        """How full the cache is, and how much it saved."""
        return _json(_stats(context))

    @routes.delete("/v1/cache", responses=json_answers(ClearedAnswer), response_class=Response)
    async def clear_cache() -> Response:
        """Forget all remembered prefixes, in memory and on disk, pinned ones too. What runs goes on."""
        freed = await context.engine.forget_cache()
        return _json(ClearedAnswer(freed.num_pages, freed.num_checkpoints, freed.num_stored))

    return routes


def _warm_requests(request: Request, raw: bytes, context: Context) -> list[ChatRequest]:
    """A body with `prompts` is a list of conversations, any other a chat request."""
    if not _has_prompts(raw):
        return [msgspec.structs.replace(_chat_request(request, raw, context), sampling=WARM_SAMPLING)]
    body = decode(raw, WarmBody)
    context.check_model(body.model)
    wanted, kwargs = conversations(body), body.chat_template_kwargs or {}
    key, tenant = record_of(request.scope).key, tenant_of(request, context.config)
    return [
        warm_request(messages, request_id=f"warm-{key}-{i}", template_kwargs=kwargs, tenant=tenant)
        for i, messages in enumerate(wanted)
    ]


def _has_prompts(raw: bytes) -> bool:
    try:
        return "prompts" in msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return False  # what is wrong with it is told by the decoder of chat requests


def _chat_request(request: Request, raw: bytes, context: Context) -> ChatRequest:
    body = decode(raw, ChatCompletionBody)
    context.check_model(body.model)
    return chat_request(
        body,
        request_id=f"cache-{record_of(request.scope).key}",
        defaults=context.service.sampling_defaults,
        tenant=tenant_of(request, context.config),
    )


async def _warm(context: Context, asked: Sequence[ChatRequest]) -> WarmAnswer:
    """One after the other: later ones often begin like earlier ones."""
    warmed = []
    for one in asked:
        async with await context.service.warm(one) as events:
            usage = (await collect(events)).usage
        warmed.append(WarmedPrompt(usage.prompt_tokens, usage.cached_tokens))
    return WarmAnswer(warmed)


async def _explain(context: Context, asked: ChatRequest) -> ExplainAnswer:
    match, explanation = await context.service.explain(asked)
    return ExplainAnswer(
        prompt_tokens=match.num_tokens,
        found_tokens=match.num_found,
        found_in_memory=match.num_memory,
        found_on_disk=match.num_stored,
        page_size=match.page_size,
        reason=explanation.reason.value,
        message=explanation.message,
        seen_tokens=explanation.num_seen,
        difference=difference_answer(explanation.difference),
        tenant=asked.tenant.hex()[:8] or None,
    )


def _stats(context: Context) -> CacheStatsAnswer:
    status, metrics = context.engine.status(), context.metrics
    stats, info = status.stats, status.info
    prompt_tokens, cached_tokens = metrics.total("prompt_tokens"), metrics.total("cached_prompt_tokens")
    requests, hits = metrics.total("prompts"), metrics.total("prompts_with_hit")
    return CacheStatsAnswer(
        pages=PagesAnswer(
            total=max(0, info.num_pages - 1) if info else 0,
            used=stats.pages_used,
            free=stats.pages_free,
            kept=stats.pages_kept,
            pinned=stats.pages_pinned,
            evicted=stats.num_evicted_pages,
            tokens_per_page=info.cache.page_size if info else 0,
            bytes_per_page=info.cache.page_bytes if info else 0,
        ),
        checkpoints=stats.num_checkpoints,
        checkpoint_bytes=stats.memory.checkpoints,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        token_hit_rate=_rate(cached_tokens, prompt_tokens),
        requests=requests,
        requests_with_hit=hits,
        request_hit_rate=_rate(hits, requests),
        requests_loading=stats.num_loading,
        disk=_disk(stats.disk) if stats.disk else None,
    )


def _disk(disk: DiskStats) -> DiskAnswer:
    return DiskAnswer(
        blobs=disk.num_blobs,
        bytes=disk.size_bytes,
        queued_bytes=disk.queued_bytes,
        ahead_bytes=disk.ahead_bytes,
        saved=disk.num_saved,
        bytes_written=disk.bytes_written,
        hits=disk.num_hits,
        bytes_read=disk.bytes_read,
        misses=disk.num_misses,
        corrupt=disk.num_corrupt,
        evicted=disk.num_evicted,
        refused=disk.num_refused,
        problem=disk.problem,
    )


def _rate(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _json(answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
