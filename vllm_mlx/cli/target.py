"""The server that a client is to use: what runs already, asked over HTTP."""

from __future__ import annotations

import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

import msgspec

from vllm_mlx.bench.http import parse_origin
from vllm_mlx.cli.client import Target
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError

_TIMEOUT_S = 10.0
_ASSUMED_CONTEXT_TOKENS = 32_768
"""When a server does not say."""
_CONTEXT_NAMES = ("max_model_len", "context_length", "context_window", "max_context_length")
"""Under these names servers say how long their context is."""


class NoServer(Exception):
    """Nothing answers at an address."""


class _Card(msgspec.Struct):
    id: str


def base_url(given: str) -> str:
    """An address without /v1 and without a slash at the end. Raises ConfigError."""
    try:
        origin = parse_origin(given)
    except ValueError as error:
        raise ConfigError(f"--url: {error}") from None
    return f"{'https' if origin.is_secure else 'http'}://{origin.authority}{origin.base_path}"


def own_url(config: Config) -> str:
    """Where a server with these settings is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def find_target(url: str, *, key: str | None) -> Target:
    """The first model of the server at `url`.

    Raises:
        NoServer: nothing answers there.
        ConfigError: something does, but not as it should.
    """
    status, body = get(url, "/v1/models", key=key)
    if status in (401, 403):
        raise ConfigError(f"{url} wants another API key: give --api-key, or set VLLM_MLX_API_KEY")
    try:
        cards = msgspec.json.decode(body)["data"]
        model = msgspec.convert(cards[0], _Card).id
    except (msgspec.MsgspecError, KeyError, IndexError, TypeError):
        raise ConfigError(f"{url} answers {status} at /v1/models, without a model: is it an OpenAI server?") from None
    context_tokens = _number(cards[0], _CONTEXT_NAMES) or _ASSUMED_CONTEXT_TOKENS
    return Target(url, model, context_tokens, key, _number(cards[0], ("max_output_tokens",)))


def is_ready(url: str) -> bool:
    """Whether the server at `url` takes requests. One without /readyz does. Raises NoServer."""
    status, _ = get(url, "/readyz", key=None)
    return status != 503


def get(url: str, path: str, *, key: str | None) -> tuple[int, bytes]:
    """Status and body. Raises NoServer."""
    request = urllib.request.Request(url + path, headers={"authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        text = (reason.strerror if isinstance(reason, OSError) else None) or str(reason) or type(reason).__name__
        raise NoServer(f"nothing answers at {url} ({text.lower()})") from None


def _number(card: dict[str, Any], names: tuple[str, ...]) -> int | None:
    found = (card.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
