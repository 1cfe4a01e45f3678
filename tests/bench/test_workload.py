"""Workload files: defaults, bodies in files, and messages that name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.bench.workload import load_workload
from vllm_mlx.core.errors import ConfigError

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def write(tmp_path: Path):
    """Write a workload of some cases; more fields by keyword."""

    def workload(*cases: Any, **more: Any) -> Path:
        path = tmp_path / "w.json"
        path.write_text(json.dumps({"name": "w", "cases": list(cases), **more}))
        return path

    return workload


def test_defaults_fill_what_a_case_leaves_open(write) -> None:
    defaults = {
        "max_tokens": 9, "enable_thinking": False, "policy_timeout_ms": 100, "extra_body": {"a": 1, "b": 1},
        "cache_policy": "before_case", "checks": {"min_chars": 2, "max_chars": 5},
    }  # fmt: skip
    own = {"max_tokens": 3, "enable_thinking": True, "extra_body": {"b": 2}, "checks": {"max_chars": 7}, "tags": ["t"]}
    found = load_workload(write({"id": "a", "messages": HI}, {"id": "b", "messages": HI, **own}, defaults=defaults))
    one, other = found.cases
    assert found.cache_policy == "before-case"
    assert (one.max_tokens, one.enable_thinking, one.policy_timeout_ms) == (9, False, 100)
    assert one.extra_body == {"a": 1, "b": 1}
    assert (other.max_tokens, other.enable_thinking, other.extra_body) == (3, True, {"a": 1, "b": 2})
    assert (other.checks.min_chars, other.checks.max_chars, other.tags) == (2, 7, ("t",))


def test_arguments_stand_in(write) -> None:
    path = write({"id": "a", "messages": HI}, defaults={"cache_policy": "preserve"})
    found = load_workload(path, cache_policy="before-run", max_tokens=77)
    assert (found.cache_policy, found.cases[0].max_tokens) == ("before-run", 77)


def test_body_in_a_file_next_to_the_workload(write, tmp_path: Path) -> None:
    body = {"model": "other", "stream": False, "messages": HI, "max_tokens": 5, "tools": [{"type": "function"}]}
    (tmp_path / "body.json").write_text(json.dumps(body))
    (tmp_path / "messages.json").write_text(json.dumps(HI))
    path = write({"id": "a", "request_path": "body.json"}, {"id": "b", "request_path": "messages.json"})
    one, other = load_workload(path).cases
    assert (one.max_tokens, one.messages, one.extra_body) == (5, tuple(HI), {"tools": [{"type": "function"}]})
    assert other.messages == tuple(HI)


@pytest.mark.parametrize(
    ("cases", "more", "words"),
    [
        ([], {}, "has no cases"),
        ([{"id": "a"}], {}, "case 'a': give either messages or request_path"),
        ([{"id": "a", "messages": HI, "request_path": "x"}], {}, "give either messages or request_path"),
        ([{"id": "a", "messages": HI}] * 2, {}, "'a' is there twice"),
        ([{"id": "a", "messages": [{"content": "x"}]}], {}, "objects with a role"),
        ([{"id": "a", "messages": []}], {}, "objects with a role"),
        ([{"id": "a", "request_path": "none.json"}], {}, "case 'a': request_path: .*none.json is no file"),
        ([{"messages": HI}], {}, "id"),
        ([{"id": "a", "messages": HI, "max_token": 3}], {}, "max_token"),
        ([{"id": "a", "messages": HI, "checks": {"minimum": 3}}], {}, "case 'a': checks: .*minimum"),
        ([{"id": "a", "messages": HI}], {"defaults": {"cache_policy": "never"}}, "cache_policy 'never' is not one of"),
        ([{"id": "a", "messages": HI}], {"default": {}}, "default"),
    ],
)
def test_wrong_workload_is_refused_by_field(write, cases: list[Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--workload: .*{words}"):
        load_workload(write(*cases, **more))
