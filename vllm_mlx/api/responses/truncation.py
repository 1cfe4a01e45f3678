"""Conversations that are too long, made to fit by forgetting their oldest turns."""

from __future__ import annotations

import msgspec

from vllm_mlx.chat.service import ChatService
from vllm_mlx.core.chat import ChatRequest, Message
from vllm_mlx.core.errors import ContextLengthExceeded


async def truncated(service: ChatService, request: ChatRequest) -> ChatRequest:
    """The request with as few turns dropped as its context and max_tokens demand.

    A turn begins with a message of the user and is dropped whole, so that no result loses its call; system messages
    at the beginning stay, and so does the last turn. If that alone is too long, it is refused later, by name.
    """
    messages = request.messages
    start = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    cuts = [i for i, message in enumerate(messages) if message.role == "user" and i > start]
    if not cuts or await _fits(service, request):
        return request
    low, high = 0, len(cuts) - 1
    while low < high:
        middle = (low + high) // 2
        if await _fits(service, _cut(request, start, cuts[middle])):
            high = middle
        else:
            low = middle + 1
    return _cut(request, start, cuts[low])


def _cut(request: ChatRequest, start: int, end: int) -> ChatRequest:
    kept: tuple[Message, ...] = (*request.messages[:start], *request.messages[end:])
    return msgspec.structs.replace(request, messages=kept)


async def _fits(service: ChatService, request: ChatRequest) -> bool:
    try:
        num_prompt = await service.count_tokens(request)
    except ContextLengthExceeded:
        return False
    return num_prompt + (request.sampling.max_tokens or 1) <= service.max_model_len
