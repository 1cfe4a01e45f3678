"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.generate import admitted, respond
from vllm_mlx.api.openapi import json_answers, json_body
from vllm_mlx.api.tenant import tenant_of
from vllm_mlx.api.wire.answers import ChatCompletionAnswer
from vllm_mlx.api.wire.chat_completions import ChatCompletionBody, chat_request, served_tier
from vllm_mlx.api.wire.chat_encoder import ChatEncoder
from vllm_mlx.api.wire.usage import answer_head


def router(context: Context) -> APIRouter:
    """The endpoint over one server."""
    routes = APIRouter(tags=["Chat"])
    service = context.service

    @routes.post(
        "/v1/chat/completions",
        openapi_extra=json_body(ChatCompletionBody),
        responses=json_answers(ChatCompletionAnswer, is_streamed=True),
        response_class=Response,
    )
    async def create_chat_completion(request: Request) -> Response:
        """Continue a conversation."""
        body, record = await admitted(request, ChatCompletionBody, context)
        request_id = f"chatcmpl-{record.key}"
        tenant = tenant_of(request, context.config)
        asked = chat_request(body, request_id=request_id, defaults=service.sampling_defaults, tenant=tenant)
        head = answer_head(request_id, context.config.model_name)
        encoder = ChatEncoder(
            head,
            has_logprobs=bool(body.logprobs),
            include_usage=body.wants_usage,
            include_reasoning=body.include_reasoning is not False,
            service_tier=served_tier(body.service_tier),
            prompt_count=body.prompt_logprobs,
            custom_tools=[tool.name for tool in asked.tools if tool.is_freeform],
        )
        return await respond(
            request, context, start=lambda: service.chat(asked), encoder=encoder, counts_on=body.wants_usage_on
        )

    return routes
