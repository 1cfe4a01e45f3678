"""Looking at responses that were made before."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.responses import Response

from vllm_mlx.api.context import Context
from vllm_mlx.api.response_store import ResponseStore
from vllm_mlx.api.responses.background import LiveRun, split
from vllm_mlx.api.responses.earlier import response_of
from vllm_mlx.api.sealed import Sealer
from vllm_mlx.api.sse import EventResponse
from vllm_mlx.api.wire.responses.body import ENCRYPTED
from vllm_mlx.core.errors import InvalidRequest

Shown = Callable[[dict[str, Any], ResponseStore], dict[str, Any]]


def check_include(include: Sequence[str]) -> Shown:
    """How a stored response is shown. Raises InvalidRequest for what cannot be added to it any more."""
    wrong = [name for name in include if name != ENCRYPTED]
    if wrong:
        message = f"include: '{wrong[0][:60]}' cannot be added to a stored response; only {ENCRYPTED} can."
        raise InvalidRequest(message, param="include", code="unsupported_value")
    return _with_sealed if include else lambda body, _: body


def _with_sealed(body: dict[str, Any], store: ResponseStore) -> dict[str, Any]:
    sealer = Sealer(store.key)
    return {**body, "output": [_sealed(item, sealer) for item in body["output"]]}


def _sealed(item: dict[str, Any], sealer: Sealer) -> dict[str, Any]:
    if item["type"] != "reasoning":
        return item
    text = "\n".join(piece["text"] for piece in item["content"] or item["summary"])
    return {**item, "encrypted_content": sealer.seal(text)}


async def followed(response_id: str, live: LiveRun | None, context: Context, *, tenant: bytes, after: int) -> Response:
    """The stream of a response that runs or ran in the background. Raises NotFound and InvalidRequest."""
    if live is not None:
        return follow(live, after=after, context=context)
    stored = await response_of(context.responses, response_id, tenant=tenant)
    if stored.events is None:
        raise InvalidRequest("Only responses made with background: true can be streamed later.", param="stream")
    return _stream(_replayed(split(stored.events)[after + 1 :]), context)


def follow(live: LiveRun, *, after: int, context: Context) -> Response:
    """The stream of a run from the event behind number `after` on; -1 is from the first."""
    return _stream(live.follow(after=after), context)


def _stream(frames: AsyncGenerator[bytes, None], context: Context) -> Response:
    return EventResponse(frames, close=_nothing, keepalive_s=context.config.keepalive_interval)


async def _replayed(frames: Sequence[bytes]) -> AsyncGenerator[bytes, None]:
    if frames:
        yield b"".join(frames)


async def _nothing() -> None:
    """The run goes on whoever looks."""
