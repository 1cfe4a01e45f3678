"""Which web pages may use the server from a browser (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from __future__ import annotations

from typing import Any

from vllm_mlx.api.generate import HIT_TOKENS

LOCAL_ORIGINS = (
    r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?|(app|file|tauri|vscode-webview|vscode-file|capacitor)://.*"
)
"""Pages of this machine, and applications made of web pages: what nobody on the Internet can claim to be."""
SHOWN_HEADERS = ("x-request-id", "request-id", "retry-after", HIT_TOKENS)
"""Headers of answers that a page may read besides those that it always may."""


def cors_options(origins: tuple[str, ...]) -> dict[str, Any]:
    """For Starlette's CORSMiddleware: local pages and those of `origins` (`*`: all) may send what they like.

    Keys travel in headers, never in cookies, so a page can do no more than whoever uses it.
    """
    return {
        "allow_origins": origins,
        "allow_origin_regex": LOCAL_ORIGINS,
        "allow_methods": ["*"],
        "allow_headers": ["*"],
        "expose_headers": SHOWN_HEADERS,
        "allow_private_network": True,
    }
