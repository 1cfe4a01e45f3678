"""Every failure becomes one JSON answer, or one last event of a stream that has begun."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_mlx.api.dialect import speaks_anthropic
from vllm_mlx.api.observe import CLIENT_GONE, RequestRecord, record_of
from vllm_mlx.api.wire.answers import ErrorAnswer, ErrorDetail
from vllm_mlx.api.wire.anthropic.errors import error_answer, status_of
from vllm_mlx.core import log
from vllm_mlx.core.errors import EngineFailure, InvalidRequest, NotFound, RequestError, ServerBusy

_log = log.get_logger("api")
_RETRY_AFTER_S = 5
"""When an answer is 503 and nobody knows better."""
_MAX_SHOWN = 200
"""Characters of a path that an error repeats."""
DONE = b"data: [DONE]\n\n"


class MethodNotAllowed(RequestError):
    """The path exists, but not with this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


def answer(error: RequestError, scope: Scope) -> Response:
    """The HTTP answer for an error, in the dialect of the request."""
    headers = {}
    if error.status == ServerBusy.status:
        headers["retry-after"] = str(error.retry_after_s if isinstance(error, ServerBusy) else _RETRY_AFTER_S)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if speaks_anthropic(scope):
        shown = error_answer(error, request_id=record_of(scope).request_id)
        return Response(msgspec.json.encode(shown), status_of(error), headers, "application/json")
    return Response(msgspec.json.encode(body(error)), error.status, headers, "application/json")


def body(error: RequestError) -> ErrorAnswer:
    """The record of an error."""
    return ErrorAnswer(ErrorDetail(error.message, error.type, error.param, error.code), error.message)


class Guard:
    """ASGI middleware: exceptions become answers. What nobody meant to raise is logged, and hidden from clients."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer errors, unless the answer has begun: then the connection is cut by raising."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, started = record_of(scope), False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            record.status = CLIENT_GONE
        except Exception as error:
            known = _known(error, record)
            if started:
                raise
            await answer(known, scope)(scope, receive, send)


async def last_event(error: RequestError) -> bytes:
    """How a stream ends that failed: the error, and `[DONE]`."""
    return b"data: " + msgspec.json.encode(body(error)) + b"\n\n" + DONE


async def guarded(
    frames: AsyncIterator[bytes],
    record: RequestRecord,
    *,
    last: Callable[[RequestError], Awaitable[bytes]] = last_event,
) -> AsyncGenerator[bytes, None]:
    """The frames of a stream; a failure becomes what `last` makes of it."""
    try:
        async for frame in frames:
            yield frame
        return
    except ClientDisconnect:
        raise
    except Exception as error:
        known = _known(error, record)
    record.status = known.status
    yield await last(known)


def _known(error: Exception, record: RequestRecord) -> RequestError:
    """The error as a RequestError, noted in the record; an unexpected one is logged with its traceback."""
    if not isinstance(error, RequestError):
        _log.error("unexpected error", exc_info=error, extra=log.fields(id=record.key))
        error = EngineFailure(f"Internal error; the server's log has the details under {record.key}.")
        error.code = "internal_error"
    record.note_error(error)
    return error


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Routing failures (unknown path, wrong method) in the shape of other errors."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:_MAX_SHOWN]
    found: RequestError
    match error.status_code:
        case 404:
            found = NotFound(f"There is nothing at {path}; /docs lists what there is.", code="unknown_path")
        case 405:
            found = MethodNotAllowed(f"{path} does not take {request.method}.")
        case _:
            found = InvalidRequest(str(error.detail))
            found.status = error.status_code
    record_of(request.scope).note_error(found)
    response = answer(found, request.scope)
    response.headers.update(error.headers or {})
    return response


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Wrong path or query parameters in the shape of other errors."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(step) for step in first["loc"][1:])
    found = InvalidRequest(f"{param}: {first['msg']}.", param=param)
    record_of(request.scope).note_error(found)
    return answer(found, request.scope)
