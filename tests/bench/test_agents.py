"""What `agents check` sends, and what it finds wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from scripted_server import CHUNKED, DONE, END, Action, Request, ScriptedServer, chunk, delta, usage, whole

from vllm_mlx.bench.agents.chat_completions import ChatCompletions
from vllm_mlx.bench.agents.check import DIALECTS, TurnReport, check_dialect
from vllm_mlx.bench.agents.conversation import NUM_QUICK_RULES, STEPS, TASK, TOOLS, Call, conversation
from vllm_mlx.bench.agents.dialect import Dialect
from vllm_mlx.bench.http import HttpClient, parse_origin

ARGUMENTS = {
    "read_file": '{"path": "notes.txt"}',
    "edit_file": '{"path": "notes.txt", "old_text": "hello", "new_text": "goodbye"}',
}
Answer = Callable[[str | None], Iterable[Action]]
"""From the tool that is asked for to what the server does."""


def asked_tool(body: Any) -> str | None:
    choice = body["tool_choice"]
    return choice["function"]["name"] if isinstance(choice, dict) else None


def stream(*pieces: bytes, prompt: int = 1000, cached: int | None = 1000) -> list[Action]:
    return [CHUNKED, *pieces, usage(prompt, 5, cached), chunk(DONE), END]


def call(name: str, arguments: str) -> list[bytes]:
    halves = [arguments[:5], arguments[5:]]
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": name, "arguments": halves[0]}}
    return [
        delta(role="assistant", tool_calls=[first]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": halves[1]}}]),
        delta("tool_calls"),
    ]


def good(tool: str | None, **counts: Any) -> list[Action]:
    if tool is None:
        return stream(delta(content="Done."), delta("stop"), **counts)
    return stream(*call(tool, ARGUMENTS[tool]), **counts)


def checked(answer: Answer, dialect: Dialect | None = None) -> tuple[list[TurnReport], list[Any]]:
    """Reports on a server that answers like this, and the bodies that it got."""

    def script(request: Request) -> Iterable[Action]:
        return answer(asked_tool(request.body))

    with ScriptedServer(script, {}) as server:
        http = HttpClient(parse_origin(server.url), timeout_s=10)
        return asyncio.run(drained(http, dialect or ChatCompletions())), server.asked


async def drained(http: HttpClient, dialect: Dialect) -> list[TurnReport]:
    return [report async for report in check_dialect(http, dialect, model="m", session="s-1")]


def test_good_server_has_no_problems() -> None:
    reports, asked = checked(good)
    assert [report.problems for report in reports] == [(), (), ()]
    assert [report.expected for report in reports] == ["read_file", "edit_file", "any"]
    assert reports[0].called == (f"read_file {ARGUMENTS['read_file']}",)
    assert all(report.ttft_ms is not None for report in reports)
    assert [len(body["messages"]) for body in asked] == [2, 4, 6]
    assert asked[1]["messages"][:2] == asked[0]["messages"]
    assert asked[2]["messages"][-1]["content"] == STEPS[1].result


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda tool: stream(delta(content="I will."), delta("stop")), "0 calls instead of one"),
        (lambda tool: stream(*call("list_files", '{"path": "."}')), "called 'list_files' instead of 'read_file'"),
        (lambda tool: stream(*call("read_file", '{"path": "no')), "arguments are not JSON"),
        (lambda tool: stream(*call("read_file", '{"file": "notes.txt"}')), "arguments are not path"),
        (lambda tool: stream(*call("read_file", '{"path": "other"}')), "path is not a value of its schema"),
        (lambda tool: whole(404, {"error": {"message": "no such model"}}), "answered 404: no such model"),
        (lambda tool: stream(*call("read_file", ARGUMENTS["read_file"])[:-1]), "the stream did not end as it should"),
        (lambda tool: [CHUNKED, chunk(b"data: {no\n\n"), END], "an event is malformed"),
        (lambda tool: [CHUNKED, *call("read_file", ARGUMENTS["read_file"]), END], "are not counted"),
    ],
)
def test_what_is_wrong_with_a_call_is_told(answer: Answer, problem: str) -> None:
    reports, _ = checked(answer)
    assert any(problem in found for found in reports[0].problems)


def test_prompt_that_is_computed_again_is_told() -> None:
    reports, _ = checked(lambda tool: good(tool, cached=949))
    assert [len(report.problems) for report in reports] == [0, 1, 1]
    assert "only 949 of the 1000 tokens of the turn before" in reports[1].problems[0]
    reports, _ = checked(lambda tool: good(tool, cached=None))
    assert not any(report.problems for report in reports)


def test_silence_is_no_answer() -> None:
    reports, _ = checked(lambda tool: good(tool) if tool else stream(delta("stop")))
    assert reports[-1].problems == ("neither an answer nor a call",)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_turn_repeats_what_was_said(dialect: Dialect) -> None:
    start = conversation("s-1")
    later = start.after(Call("call_1", "read_file", ARGUMENTS["read_file"]), "hello")
    one, two = (json.dumps(dialect.body(talk, model="m", step=STEPS[1])) for talk in (start, later))
    for text in (one, two):
        assert all(tool.description in text for tool in TOOLS)
        assert TASK in text
        assert "Session s-1." in text
    assert "call_1" in two
    assert len(two) > len(one) > 5000
    quick = json.dumps(dialect.body(conversation("s-1", num_rules=NUM_QUICK_RULES), model="m", step=STEPS[1]))
    assert len(quick) < len(one) / 2
