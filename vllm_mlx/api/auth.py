"""The API key."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_mlx.core.errors import Unauthorized

OPEN_PATHS = frozenset(
    {
        "/",
        "/health",
        "/livez",
        "/readyz",
        "/version",
        "/metrics",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
    }
)
"""Paths that need no key; every other path does."""


class Auth:
    """ASGI middleware: without the key only `OPEN_PATHS` answer. No key configured: everything answers."""

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._key = api_key.encode() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Unauthorized."""
        if self._key is not None and scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            check(Headers(scope=scope), self._key)
        await self._app(scope, receive, send)


def check(headers: Headers, key: bytes) -> None:
    """Compare in constant time. Raises Unauthorized if the key is missing or wrong."""
    given = presented(headers)
    if given is None:
        raise Unauthorized("API key required: send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'.")
    if not hmac.compare_digest(given, key):
        raise Unauthorized("Invalid API key.")


def presented(headers: Headers) -> bytes | None:
    """The key that a request carries, from either header."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    value = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
    return value.encode("latin-1") if value else None
