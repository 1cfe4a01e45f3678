"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.generate import admitted, respond
from vllm_mlx.api.openapi import json_answers, json_body
from vllm_mlx.api.tenant import tenant_of
from vllm_mlx.api.wire.answers import CompletionAnswer
from vllm_mlx.api.wire.completion_encoder import CompletionEncoder
from vllm_mlx.api.wire.completions import CompletionBody, best_of, completion_request
from vllm_mlx.api.wire.usage import answer_head


def router(context: Context) -> APIRouter:
    """The endpoint over one server."""
    routes = APIRouter(tags=["Completions"])
    service = context.service

    @routes.post(
        "/v1/completions",
        openapi_extra=json_body(CompletionBody),
        responses=json_answers(CompletionAnswer, is_streamed=True),
        response_class=Response,
    )
    async def create_completion(request: Request) -> Response:
        """Continue text or token ids, without a chat template."""
        body, record = await admitted(request, CompletionBody, context)
        request_id = f"cmpl-{record.key}"
        tenant = tenant_of(request, context.config)
        asked = completion_request(body, request_id=request_id, defaults=service.sampling_defaults, tenant=tenant)
        head = answer_head(request_id, context.config.model_name)
        encoder = CompletionEncoder(
            head,
            has_logprobs=body.logprobs is not None,
            include_usage=body.wants_usage,
            num_top=body.logprobs or 0,
            echoes=bool(body.echo) and body.logprobs is not None,
            prompt_count=body.prompt_logprobs,
            best=best_of(body),
        )
        return await respond(
            request, context, start=lambda: service.complete(asked), encoder=encoder, counts_on=body.wants_usage_on
        )

    return routes
