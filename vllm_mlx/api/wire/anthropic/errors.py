"""Errors in Anthropic's shape (https://platform.claude.com/docs/en/api/errors)."""

from __future__ import annotations

from types import MappingProxyType

from msgspec import UNSET

from vllm_mlx.api.wire.anthropic.answers import ErrorAnswer, ErrorDetail
from vllm_mlx.core.errors import InvalidRequest, RequestError, ServerBusy

OVERLOADED = 529
"""Anthropic's status of a server that has too much to do."""
_TYPES = MappingProxyType(
    {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        409: "invalid_request_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
        OVERLOADED: "overloaded_error",
    }
)


_DETAILS = MappingProxyType({"thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}})
"""By the field at fault. Told so, Anthropic's clients send all messages themselves."""


def error_answer(error: RequestError, *, request_id: str) -> ErrorAnswer:
    """The record of an error."""
    status = status_of(error)
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    details = _DETAILS.get(error.param or "", UNSET) if isinstance(error, InvalidRequest) else UNSET
    return ErrorAnswer(ErrorDetail(kind, error.message, details), request_id)


def status_of(error: RequestError) -> int:
    """The HTTP status of an error."""
    return OVERLOADED if isinstance(error, ServerBusy) else error.status
