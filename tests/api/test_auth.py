"""The API key guards everything that is not open by name."""

from __future__ import annotations

import httpx
import pytest

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.anyio

KEY = "clé-secrète"


@pytest.fixture(scope="module")
def config() -> Config:
    return Config(model="m", api_key=KEY)


def bearer(key: str, scheme: str = "Bearer") -> dict[str, bytes]:
    return {"authorization": f"{scheme} {key}".encode()}


OPEN = ("/", "/health", "/livez", "/readyz", "/version", "/metrics", "/docs", "/openapi.json")


@pytest.mark.parametrize("path", OPEN)
async def test_open_path_needs_no_key(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/m"),
        ("GET", "/v1/status"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/nothing"),
        ("GET", "/health/"),
    ],
)
async def test_any_other_path_needs_the_key(client: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await client.request(method, path, json={})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "API key required" in answer.json()["detail"]


@pytest.mark.parametrize(
    "headers",
    [bearer(KEY), bearer(KEY, "bearer"), bearer(f" {KEY} "), {"x-api-key": KEY.encode()}],
)
async def test_right_key_passes(client: httpx.AsyncClient, headers: dict[str, bytes]) -> None:
    assert (await client.get("/v1/models", headers=headers)).status_code == 200


WRONG = ["wrong", KEY + "x", KEY[:-1], "Bearer", ""]


@pytest.mark.parametrize("headers", [*map(bearer, WRONG), bearer(KEY, "Basic"), {"x-api-key": b"\xff\xfe"}])
async def test_wrong_key_is_401(client: httpx.AsyncClient, headers: dict[str, bytes]) -> None:
    answer = await client.get("/v1/models", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in answer.text
