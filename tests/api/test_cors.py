"""Browsers may show answers to pages of this machine, and to those that the operator named."""

from __future__ import annotations

import httpx
import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError

pytestmark = pytest.mark.anyio

OPENAI = {"access-control-request-headers": "authorization,content-type,x-stainless-lang"}
ANTHROPIC = {"access-control-request-headers": "x-api-key,anthropic-version,anthropic-dangerous-direct-browser-access"}
KNOWN = ("http://localhost:3000", "http://127.0.0.1", "https://[::1]:8443", "tauri://localhost", "https://chat.test")
UNKNOWN = ("https://evil.test", "http://localhost.evil.test", "https://chat.test:81", "null")


@pytest.fixture(scope="module")
def config() -> Config:
    return Config(model="m", api_key="k", allowed_origins=("https://chat.test, https://other.test",))


def asked(origin: str, method: str = "POST") -> dict[str, str]:
    return {"origin": origin, "access-control-request-method": method}


@pytest.mark.parametrize("headers", [OPENAI, ANTHROPIC])
@pytest.mark.parametrize("origin", KNOWN)
async def test_pages_that_are_allowed_may_ask_without_a_key(
    client: httpx.AsyncClient, origin: str, headers: dict[str, str]
) -> None:
    answer = await client.options("/v1/messages", headers={**asked(origin), **headers})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"]
    assert set(headers["access-control-request-headers"].split(",")) <= {name.strip() for name in allowed.split(",")}


@pytest.mark.parametrize("origin", UNKNOWN)
async def test_other_pages_get_no_leave(client: httpx.AsyncClient, origin: str) -> None:
    answer = await client.options("/v1/models", headers=asked(origin, "GET"))
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
    answer = await client.get("/v1/models", headers={"origin": origin, "authorization": "Bearer k"})
    assert answer.status_code == 200, "what is no browser is not asked where it comes from"
    assert "access-control-allow-origin" not in answer.headers


async def test_pages_read_errors_and_what_headers_tell(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/models", headers={"origin": KNOWN[0]})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == KNOWN[0]
    assert {"x-request-id", "x-cache-hit-tokens"} <= {
        name.strip() for name in answer.headers["access-control-expose-headers"].split(",")
    }


@pytest.mark.parametrize("origin", ["chat.test", "https://chat.test/", "https://", "https://a b"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origins"):
        Config(model="m", allowed_origins=(origin,))


def test_all_pages_may_be_allowed() -> None:
    assert Config(model="m", allowed_origins=("*",)).origins == ("*",)
