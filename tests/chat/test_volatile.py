"""What changes with every request: taken out where it means nothing, recognised where it may mean something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.chat.volatile import RULES, stable_messages, volatile_field
from vllm_mlx.core.chat import Message, TextPart

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "clients" / "recorded"
HEADER = "x-anthropic-billing-header: cc_version=2.1.{}; cc_entrypoint=cli; cch={};"


def billed(version: str, checksum: str, text: str) -> str:
    return HEADER.format(version, checksum) + text


def test_prompts_that_differ_in_the_billing_line_become_equal() -> None:
    one = stable_messages([Message("system", billed("197.fbe", "00a1f", "\nYou are helpful."))])
    other = stable_messages([Message("system", billed("198.1c0", "9d3e0", "\nYou are helpful."))])
    assert one == other == (Message("system", "You are helpful."),)


def test_a_part_that_is_only_the_billing_line_goes_and_the_others_stay() -> None:
    parts = (TextPart(billed("197.fbe", "00a1f", "")), TextPart("You are helpful."), TextPart("Today is 2026-11-21."))
    assert stable_messages([Message("system", parts)]) == (Message("system", parts[1:]),)


@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_the_same_line_elsewhere_is_content(role: str) -> None:
    messages = (Message(role, billed("197.fbe", "00a1f", "")),)
    assert stable_messages(messages) == messages


def test_system_text_that_speaks_of_the_line_is_content() -> None:
    messages = (Message("system", "Explain this log:\nx-anthropic-billing-header: cch=1;\nbriefly"),)
    assert stable_messages(messages) == messages


@pytest.mark.parametrize(
    "text",
    ["Today's date is 2026-11-21.", "Current time: 10:42:07", "Session 3f0c9b7e-7f5e-4c59-9d43-0a3f6f1f2a11", ""],
)
def test_what_the_model_may_need_is_never_touched(text: str) -> None:
    messages = (Message("system", text), Message("user", text), Message("assistant", None))
    assert stable_messages(messages) == messages


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_says_why_it_is_safe_and_changes_nothing_twice(rule: Any) -> None:
    assert len(rule.reason) > 40
    assert rule.role in ("system", "user")
    once = rule.pattern.sub(rule.replacement, billed("1.a", "2", "\nrest"))
    assert rule.pattern.sub(rule.replacement, once) == once == "rest"


@pytest.mark.parametrize(
    ("before", "given", "earlier", "name"),
    [
        ("x-anthropic-billing-header: cc_version=2.1; cch=", "00a1f;\nYou", "9d3e0;\nYou", "billing line"),
        ("Today is 2026-11-", "21.", "22.", "date"),
        ("Today's date: Sat Nov 2", "1 2026", "2 2026", "date"),
        ("Today: ", "November 21, 2026", "December 1, 2026", "date"),
        ("Now: 2026-11-21T10:", "42:07Z", "43:11Z", "date and time"),
        ("Current time: 10:4", "2 pm", "3 pm", "time"),
        ("session: 3f0c9b7e-7f5e-4c59-9d43-", "0a3f6f1f2a11", "1a3f6f1f2a11", "identifier"),
        ("Token usage: 1", "2345/200000", "5999/200000", "token count"),
        ("request ", "deadbeefcafe0123 end", "0123deadbeefcafe end", "checksum"),
    ],
)
def test_difference_inside_a_field_that_changes_by_itself_is_named(
    before: str, given: str, earlier: str, name: str
) -> None:
    assert volatile_field(before, given, earlier) == name


@pytest.mark.parametrize(
    ("before", "given", "earlier"),
    [
        ("Today is 2026-11-21. You are ", "helpful", "harmful"),
        ("The answer is ", "forty", "fifty"),
        ("Today is ", "2026-11-21", "a good day"),
        ("", "", "2026-11-21"),
    ],
)
def test_other_differences_are_not(before: str, given: str, earlier: str) -> None:
    assert volatile_field(before, given, earlier) is None


def recorded_systems() -> list[tuple[str, ...]]:
    """Texts of the system blocks of recorded requests to /v1/messages."""
    found = []
    for path in sorted(RECORDED.glob("*/*_POST_v1_messages.json")):
        body = json.loads(path.read_text())["body"]
        system = body.get("system", "")
        found.append((system,) if isinstance(system, str) else tuple(block["text"] for block in system))
    return found


@pytest.mark.skipif(not RECORDED.exists(), reason="needs the recorded requests")
def test_recorded_requests_lose_the_billing_line_and_nothing_else() -> None:
    num_lines = 0
    for texts in recorded_systems():
        message = Message("system", tuple(map(TextPart, texts)))
        kept = tuple(part.text for part in stable_messages([message])[0].content or ())
        expected = tuple(text for text in texts if not text.startswith("x-anthropic-billing-header:"))
        assert kept == expected
        num_lines += len(texts) - len(expected)
    assert num_lines >= 2
