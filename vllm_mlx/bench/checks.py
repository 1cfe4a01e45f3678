"""Checks that an answer of a workload must pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from vllm_mlx.bench.sample import Sample, ToolCall

TextList = str | list[str]


class Checks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked of an answer; absent fields ask nothing."""

    finish_reason: TextList | None = None
    """One of these."""
    required_regex: TextList = ()  # type: ignore[assignment]
    """Each is found in the text."""
    forbidden_regex: TextList = ()  # type: ignore[assignment]
    """None is found in the text."""
    min_chars: int | None = None
    max_chars: int | None = None
    """Of the text without surrounding space."""
    is_json: bool = msgspec.field(default=False, name="json")
    """The text is JSON; a fence of three backticks around it is allowed."""
    tool_call_count: int | None = None
    tool_call_names: list[str] | None = None
    """Exactly these functions are called, in any order."""
    tool_call_args_required_keys: dict[str, list[str]] | None = None
    """Function -> keys that the arguments of each call of it must have."""
    no_tool_calls: bool = False

    def __post_init__(self) -> None:
        for pattern in (*listed(self.required_regex), *listed(self.forbidden_regex)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def issues(sample: Sample, checks: Checks) -> list[str]:
    """One line for everything that is wrong; empty if the answer passes."""
    if sample.failure is not None:
        return [f"{sample.failure.label}: {sample.failure.message}"]
    return [*_finish(sample, checks), *_text(sample.content, checks), *_tools(sample.tool_calls, checks)]


def listed(value: TextList | None) -> tuple[str, ...]:
    """A text, or a list of texts, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _finish(sample: Sample, checks: Checks) -> Iterator[str]:
    allowed = listed(checks.finish_reason)
    if allowed and sample.finish_reason not in allowed:
        yield f"finish_reason is {sample.finish_reason!r}, not {' or '.join(map(repr, allowed))}"


def _text(content: str, checks: Checks) -> Iterator[str]:
    for pattern in listed(checks.required_regex):
        if not re.search(pattern, content):
            yield f"required_regex {pattern!r} is not found"
    for pattern in listed(checks.forbidden_regex):
        if re.search(pattern, content):
            yield f"forbidden_regex {pattern!r} is found"
    length = len(content.strip())
    if checks.min_chars is not None and length < checks.min_chars:
        yield f"{length} characters, fewer than min_chars {checks.min_chars}"
    if checks.max_chars is not None and length > checks.max_chars:
        yield f"{length} characters, more than max_chars {checks.max_chars}"
    if checks.is_json and not _is_json(content):
        yield "the text is not JSON"


def _tools(calls: tuple[ToolCall, ...], checks: Checks) -> Iterator[str]:
    names = [call.name for call in calls]
    if checks.no_tool_calls and calls:
        yield f"no_tool_calls, but it calls {', '.join(names)}"
    if checks.tool_call_count is not None and len(calls) != checks.tool_call_count:
        yield f"{len(calls)} tool calls, not tool_call_count {checks.tool_call_count}"
    if checks.tool_call_names is not None and sorted(names) != sorted(checks.tool_call_names):
        yield f"calls {names}, not tool_call_names {checks.tool_call_names}"
    for call in calls:
        yield from _arguments(call, (checks.tool_call_args_required_keys or {}).get(call.name, []))


def _arguments(call: ToolCall, required: list[str]) -> Iterator[str]:
    if not required:
        return
    try:
        arguments: Any = json.loads(call.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        yield f"the arguments of {call.name} are not a JSON object"
        return
    missing = [key for key in required if key not in arguments]
    if missing:
        yield f"the arguments of {call.name} lack {', '.join(missing)}"


def _is_json(content: str) -> bool:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", content, re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else content)
    except ValueError:
        return False
    return True
