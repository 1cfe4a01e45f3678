"""Settings that cannot work are refused when the server starts, not at its first request."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"default_temperature": 9.0}, "--default-temperature"),
        ({"default_top_k": -5}, "--default-top-k"),
        ({"default_repetition_penalty": 0.0}, "--default-repetition-penalty"),
    ],
)
def test_a_sampling_default_out_of_range_is_refused(setting: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        Config(**setting)


def test_sampling_defaults_in_range_are_accepted() -> None:
    assert Config(default_temperature=0.5, default_top_k=-1).sampling_defaults == {"temperature": 0.5, "top_k": -1}


@pytest.mark.parametrize(("field", "flag"), [("model", "--model"), ("api_key", "--api-key")])
def test_empty_text_is_not_taken_for_absent(field: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} must not be empty"):
        Config(**{field: ""})


@pytest.mark.parametrize("name", ["", "x tenant", "x-tenant:", "é"])
def test_tenant_header_must_be_a_header_name(name: str) -> None:
    with pytest.raises(ConfigError, match="--cache-tenant-header"):
        Config(cache_tenant_header=name)
    assert Config(cache_tenant_header="X-Tenant").cache_tenant_header == "X-Tenant"
