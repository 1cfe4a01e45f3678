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


@pytest.mark.parametrize(
    ("field", "flag"),
    [
        ("model", "--model"),
        ("api_key", "--api-key"),
        ("ssd_cache_dir", "--ssd-cache-dir"),
        ("ssd_cache_key_file", "--ssd-cache-key-file"),
    ],
)
def test_empty_text_is_not_taken_for_absent(field: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} must not be empty"):
        Config(**{field: ""})


@pytest.mark.parametrize("name", ["", "x tenant", "x-tenant:", "é"])
def test_tenant_header_must_be_a_header_name(name: str) -> None:
    with pytest.raises(ConfigError, match="--cache-tenant-header"):
        Config(cache_tenant_header=name)
    assert Config(cache_tenant_header="X-Tenant").cache_tenant_header == "X-Tenant"


@pytest.mark.parametrize("setting", [{"ssd_cache_dir": "folder"}, {"warm_prompts": "file.json"}])
def test_what_keeps_prefixes_is_refused_where_none_are_kept(setting: dict[str, Any]) -> None:
    (field,) = setting
    with pytest.raises(ConfigError, match=f"--{field.replace('_', '-')}.*--no-prefix-cache"):
        Config(prefix_cache=False, **setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"ssd_cache_max_gb": 0.0},
        {"ssd_cache_max_gb": float("inf")},
        {"ssd_cache_daily_write_gb": -1.0},
        {"ssd_cache_min_free_gb": float("nan")},
        {"ssd_cache_key_file": "key"},
    ],
)
def test_a_disk_cache_setting_that_makes_no_sense_is_refused(setting: dict[str, Any]) -> None:
    (field,) = setting
    with pytest.raises(ConfigError, match="--" + field.replace("_", "-")):
        Config(**setting)
