"""Names under which the served model answers."""

from __future__ import annotations

import logging

import httpx
import pytest

from vllm_mlx.api.model_names import ModelNames
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError, NotFound


def names(**settings: object) -> ModelNames:
    return ModelNames(Config(model="/models/fake", served_model_name="org/fake-model", **settings))


def accepts(known: ModelNames, name: str | None) -> bool:
    try:
        known.check(name)
    except NotFound:
        return False
    return True


def test_unknown_name_is_told_the_served_one() -> None:
    with pytest.raises(NotFound, match=r"'other' does not exist. Available model: 'org/fake-model'") as caught:
        names().check("other")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize("name", ["org/fake-model", "/models/fake", "default", None])
def test_own_names_are_accepted_without_aliases(name: str | None) -> None:
    assert accepts(names(model_aliases=False), name)


@pytest.mark.parametrize(
    "name", ["claude-sonnet-4-5-20250929", "gpt-5.1-codex-max", "GPT-4o", "codex-mini-latest", "o3", "o4-mini"]
)
def test_names_of_cloud_models_are_aliases_unless_switched_off(name: str) -> None:
    assert accepts(names(), name)
    assert not accepts(names(model_aliases=False), name)


@pytest.mark.parametrize("name", ["", "llama-3", "openai/gpt-4o", "o", "ollama", "my-gpt-4"])
def test_other_names_are_unknown(name: str) -> None:
    assert not accepts(names(), name)


def test_own_patterns_are_aliases_too() -> None:
    known = names(model_alias=("my-*", "coder=org/fake-model"), model_aliases=False)
    assert accepts(known, "My-Model")
    assert accepts(known, "coder")
    assert not accepts(known, "gpt-4o")


def test_alias_of_a_model_that_is_not_served_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--model-alias: 'other' is not served; the served model is 'org/fake"):
        names(model_alias=("my-*=other",))
    with pytest.raises(ConfigError, match="--model-alias must be"):
        names(model_alias=("=org/fake-model",))


def test_alias_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    known = names()
    with caplog.at_level(logging.INFO, logger="vllm_mlx"):
        for name in ("gpt-4o", "gpt-4o", "claude-3", "org/fake-model"):
            known.check(name)
    assert [record.args for record in caplog.records] == [
        ("gpt-4o", "org/fake-model"),
        ("claude-3", "org/fake-model"),
    ]


@pytest.mark.anyio
async def test_answer_names_the_served_model(client: httpx.AsyncClient) -> None:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert answer.json()["model"] == "org/fake-model"
    assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["org/fake-model"]
    assert (await client.get("/v1/models/gpt-4o-mini")).json()["id"] == "org/fake-model"
