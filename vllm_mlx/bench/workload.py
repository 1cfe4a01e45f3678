"""Workload files: cases with answers that are checked.

{"name": ..., "description": ...,
 "defaults": {"max_tokens", "enable_thinking", "policy_timeout_ms", "extra_body", "cache_policy", "checks"},
 "cases": [{"id", "messages" or "request_path", "max_tokens", "enable_thinking", "extra_body",
            "policy_timeout_ms", "tags", "checks"}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from vllm_mlx.bench.checks import Checks
from vllm_mlx.bench.prompts import is_conversation, read_json
from vllm_mlx.core.errors import ConfigError

FLAG = "--workload"
CachePolicy = Literal["preserve", "before-run", "before-case"]
DEFAULT_MAX_TOKENS = 256


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For cases that do not say otherwise."""

    max_tokens: int | None = None
    enable_thinking: bool | None = None
    policy_timeout_ms: float | None = None
    """Longest time that the product allows an answer to take. It is compared, never enforced."""
    extra_body: dict[str, Any] = {}
    cache_policy: str | None = None
    checks: dict[str, Any] = {}


class WrittenCase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A case as it stands in the file."""

    id: str
    messages: list[dict[str, Any]] | None = None
    request_path: str | None = None
    """A JSON file with a whole request body, or with its messages; relative to the workload file."""
    max_tokens: int | None = None
    enable_thinking: bool | None = None
    extra_body: dict[str, Any] = {}
    policy_timeout_ms: float | None = None
    tags: list[str] = []
    checks: dict[str, Any] = {}


class WorkloadFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    name: str
    cases: list[WrittenCase]
    description: str = ""
    defaults: Defaults = Defaults()


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A case with its defaults filled in."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int
    enable_thinking: bool | None
    extra_body: Mapping[str, Any]
    policy_timeout_ms: float | None
    tags: tuple[str, ...]
    checks: Checks


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What to run."""

    name: str
    description: str
    cache_policy: CachePolicy
    cases: tuple[Case, ...]


def load_workload(path: Path, *, cache_policy: CachePolicy | None = None, max_tokens: int | None = None) -> Workload:
    """Read a workload. The arguments win over its defaults: the policy over all, the length where a case has none.

    Raises:
        ConfigError: the file is not a workload; the message names the field.
    """
    try:
        written = msgspec.convert(read_json(path, flag=FLAG), WorkloadFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{FLAG}: {path}: {error}") from None
    if not written.cases:
        raise ConfigError(f"{FLAG}: {path} has no cases")
    ids = [case.id for case in written.cases]
    if repeated := sorted({one for one in ids if ids.count(one) > 1}):
        raise ConfigError(f"{FLAG}: {path}: case ids must differ, {repeated[0]!r} is there twice")
    defaults = written.defaults
    return Workload(
        name=written.name,
        description=written.description,
        cache_policy=cache_policy or _policy(defaults.cache_policy or "preserve", path),
        cases=tuple(_case(case, defaults, path=path, max_tokens=max_tokens) for case in written.cases),
    )


def _case(case: WrittenCase, defaults: Defaults, *, path: Path, max_tokens: int | None) -> Case:
    where = f"{FLAG}: {path}: case {case.id!r}"
    body = _request(case, path, where=where)
    length = case.max_tokens or body.pop("max_tokens", None) or defaults.max_tokens or max_tokens
    thinking = defaults.enable_thinking if case.enable_thinking is None else case.enable_thinking
    timeout_ms = defaults.policy_timeout_ms if case.policy_timeout_ms is None else case.policy_timeout_ms
    try:
        checks = msgspec.convert({**defaults.checks, **case.checks}, Checks)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: checks: {error}") from None
    return Case(
        id=case.id,
        messages=tuple(body.pop("messages")),
        max_tokens=length or DEFAULT_MAX_TOKENS,
        enable_thinking=thinking,
        extra_body=body | defaults.extra_body | case.extra_body,
        policy_timeout_ms=timeout_ms,
        tags=tuple(case.tags),
        checks=checks,
    )


def _request(case: WrittenCase, path: Path, *, where: str) -> dict[str, Any]:
    """Fields of the request that the case is written with; `messages` among them."""
    if (case.messages is None) == (case.request_path is None):
        raise ConfigError(f"{where}: give either messages or request_path")
    if case.request_path is None:
        value: Any = {"messages": case.messages}
    else:
        value = read_json(path.parent / case.request_path, flag=f"{where}: request_path")
    body = {"messages": value} if isinstance(value, list) else value
    if not isinstance(body, dict) or not is_conversation(body.get("messages")):
        raise ConfigError(f"{where}: its messages must be a list of objects with a role")
    streaming = ("model", "stream", "stream_options")
    return {name: field for name, field in body.items() if name not in streaming}


def _policy(text: str, path: Path) -> CachePolicy:
    match text.replace("_", "-"):
        case "preserve":
            return "preserve"
        case "before-run":
            return "before-run"
        case "before-case":
            return "before-case"
    raise ConfigError(f"{FLAG}: {path}: cache_policy {text!r} is not one of preserve, before-run, before-case")
