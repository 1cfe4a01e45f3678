"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.dialect import speaks_anthropic
from vllm_mlx.api.openapi import json_answers
from vllm_mlx.api.wire.answers import Capabilities, ModelCard, ModelList
from vllm_mlx.api.wire.anthropic.models import model_info, model_list


def router(context: Context) -> APIRouter:
    """The endpoints over one server."""
    routes = APIRouter(tags=["Models"])

    @routes.get("/v1/models", responses=json_answers(ModelList), response_class=Response)
    async def list_models(
        request: Request,
        _limit: Annotated[int, Query(alias="limit", ge=1, le=1000)] = 20,
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> Response:
        """The models that requests may name; in Anthropic's shape for its clients, who ask in pages."""
        if not speaks_anthropic(request.scope):
            return _json(ModelList([_card(context)]))
        info = model_info(_card(context), max_output=context.config.max_request_tokens)
        # There is one: nothing stands before or behind it.
        return _json(model_list([info] if after_id is None and before_id is None else []))

    @routes.get("/v1/models/{model_id:path}", responses=json_answers(ModelCard), response_class=Response)
    async def retrieve_model(request: Request, model_id: str) -> Response:
        """One model, by any of its names; names may contain slashes."""
        context.check_model(model_id)
        if speaks_anthropic(request.scope):
            return _json(model_info(_card(context), max_output=context.config.max_request_tokens))
        return _json(_card(context))

    return routes


def _card(context: Context) -> ModelCard:
    info, service = context.engine.status().info, context.service
    tools, reasoning = service.formats.tools, service.formats.reasoning
    max_model_len = info.max_model_len if info else None
    return ModelCard(
        id=context.config.model_name,
        created=context.started_at,
        max_model_len=max_model_len,
        context_length=max_model_len,
        context_window=max_model_len,
        max_output_tokens=min(context.config.max_request_tokens, max_model_len) if max_model_len else None,
        root=context.config.model,
        capabilities=Capabilities(
            completions=True,
            chat=service.has_chat,
            tools=service.has_chat and tools is not None,
            reasoning=service.has_chat and reasoning is not None,
        ),
        tool_call_parser=tools.name if tools else None,
        reasoning_parser=reasoning.name if reasoning else None,
        defaults=dict(service.sampling_defaults),
    )


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
