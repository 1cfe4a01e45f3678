"""The small endpoints."""

from __future__ import annotations

import httpx
import pytest
from fixtures_server import Parts, client_of

from vllm_mlx import __version__
from vllm_mlx.api.app import create_app

pytestmark = pytest.mark.anyio

MODEL = "org/fake-model"


async def test_models_are_listed(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/v1/models")).json()
    assert answer["object"] == "list"
    (card,) = answer["data"]
    assert (card["id"], card["object"], card["root"], card["max_model_len"]) == (MODEL, "model", "/models/fake", 512)
    assert isinstance(card["created"], int)


@pytest.mark.parametrize("path", [MODEL, "org%2Ffake-model", "default", "/models/fake"])
async def test_model_is_found_by_any_of_its_names(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(f"/v1/models/{path}")).json()["id"] == MODEL


async def test_unknown_model_is_404(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/models/nope")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_healthy_server_says_what_it_serves(client: httpx.AsyncClient) -> None:
    health = (await client.get("/health")).json()
    assert (health["status"], health["model_loaded"], health["model_name"]) == ("healthy", True, MODEL)
    assert (health["available_models"], health["model_type"], health["engine_type"]) == ([MODEL], "llm", "batched")
    assert (health["engine"]["state"], health["engine"]["restarts"]) == ("ready", 0)


@pytest.mark.parametrize("path", ["/", "/health", "/livez", "/readyz"])
async def test_head_has_no_body(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.head(path)
    assert answer.status_code == 200


async def test_version_is_the_packages(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": __version__}
    assert (await client.get("/")).json()["version"] == __version__


async def test_apps_in_one_process_share_no_counters(client: httpx.AsyncClient, parts: Parts) -> None:
    other = create_app(parts.config, parts.service, parts.engine)
    await client.get("/version")
    async with client_of(other) as second:
        assert 'endpoint="/version"' not in (await second.get("/metrics")).text
