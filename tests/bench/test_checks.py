"""Each check, kept and broken."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vllm_mlx.bench.checks import Checks, issues
from vllm_mlx.bench.sample import Failure, FailureKind, Sample, ToolCall

CALL = ToolCall("find", '{"city": "Paris", "days": 2}')


def answer(content: str = "", *calls: ToolCall, finish: str = "stop") -> Sample:
    return Sample(started_s=0, e2e_s=1, content=content, tool_calls=calls, finish_reason=finish)


def found(checks: dict[str, Any], sample: Sample) -> list[str]:
    return issues(sample, msgspec.convert(checks, Checks))


@pytest.mark.parametrize(
    ("checks", "good", "bad"),
    [
        ({"finish_reason": "stop"}, answer(), answer(finish="length")),
        ({"finish_reason": ["stop", "length"]}, answer(finish="length"), answer(finish="tool_calls")),
        ({"required_regex": ["Par.s", "^The"]}, answer("The city of Paris"), answer("Paris")),
        ({"required_regex": "Paris"}, answer("in Paris"), answer("in Rome")),
        ({"forbidden_regex": ["(?i)sorry"]}, answer("Here it is"), answer("I am SORRY")),
        ({"min_chars": 3}, answer("abc"), answer("  ab  ")),
        ({"max_chars": 3}, answer(" abc "), answer("abcd")),
        ({"json": True}, answer('{"a": [1]}'), answer("a: 1")),
        ({"json": True}, answer('```json\n{"a": 1}\n```'), answer('Here: {"a": 1}')),
        ({"tool_call_count": 1}, answer("", CALL), answer("", CALL, CALL)),
        ({"tool_call_names": ["find"]}, answer("", CALL), answer("")),
        ({"tool_call_args_required_keys": {"find": ["city"]}}, answer("", CALL), answer("", ToolCall("find", "{}"))),
        ({"tool_call_args_required_keys": {"find": ["city"]}}, answer("x"), answer("", ToolCall("find", '{"ci'))),
        ({"no_tool_calls": True}, answer("x"), answer("x", CALL)),
    ],
)
def test_check_tells_good_from_bad(checks: dict[str, Any], good: Sample, bad: Sample) -> None:
    assert found(checks, good) == []
    [line] = found(checks, bad)
    assert line


def test_without_checks_every_complete_answer_passes() -> None:
    assert found({}, answer("anything")) == []
    failed = Sample(started_s=0, e2e_s=1, failure=Failure(FailureKind.TIMEOUT, "too long"))
    assert found({}, failed) == ["timeout: too long"]


def test_all_issues_are_named() -> None:
    assert len(found({"json": True, "min_chars": 9, "finish_reason": "stop"}, answer("x", finish="length"))) == 3


@pytest.mark.parametrize("checks", [{"requred_regex": ["x"]}, {"min_chars": "3"}, {"required_regex": ["("]}])
def test_wrong_checks_are_refused(checks: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(checks, Checks)
