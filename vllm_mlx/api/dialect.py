"""Whose API a request speaks, as far as its errors and headers are concerned."""

from __future__ import annotations

from starlette.types import Scope

VERSION_HEADER = b"anthropic-version"
_OWN_PATH = "/v1/messages"
_SHARED_PATH = "/v1/models"


def speaks_anthropic(scope: Scope) -> bool:
    """Whether it is Anthropic's: by its path, or by the header that its clients send to paths that both have."""
    path: str = scope["path"]
    if path == _OWN_PATH or path.startswith(_OWN_PATH + "/"):
        return True
    is_shared = path == _SHARED_PATH or path.startswith(_SHARED_PATH + "/")
    return is_shared and any(name == VERSION_HEADER for name, _ in scope["headers"])
