"""Replays the conversation in a dialect, and judges every turn."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from vllm_mlx.bench.agents.chat_completions import ChatCompletions
from vllm_mlx.bench.agents.conversation import NUM_RULES, STEPS, TOOLS, Call, Step, conversation
from vllm_mlx.bench.agents.dialect import Dialect, Heard
from vllm_mlx.bench.agents.messages import Messages
from vllm_mlx.bench.agents.responses import Responses
from vllm_mlx.bench.client import error_text
from vllm_mlx.bench.http import BrokenOff, ConnectionFailed, HttpClient, TimedOut
from vllm_mlx.bench.sse import EventReader

DIALECTS: tuple[Dialect, ...] = (ChatCompletions(), Responses(), Messages())
MIN_CACHED = 0.95
"""Of the prompt of a turn, this much of the one before must be found again."""
_DONE = b"[DONE]"


class TurnReport(msgspec.Struct, frozen=True):
    """How one turn went."""

    dialect: str
    number: int
    """From 1."""
    expected: str
    """The tool to call; `any` if the model may do as it likes."""
    called: tuple[str, ...]
    """Calls as they were read: name and arguments."""
    num_prompt: int | None
    num_cached: int | None
    """None if the server does not say."""
    ttft_ms: float | None
    """Until the first event that is text or a call."""
    total_ms: float
    """Until the answer was whole."""
    problems: tuple[str, ...]
    """What is wrong; nothing if all is well."""


async def check_dialect(
    http: HttpClient, dialect: Dialect, *, model: str, session: str, num_rules: int = NUM_RULES
) -> AsyncIterator[TurnReport]:
    """Every turn when it is over, up to the first that cannot be built on.

    `session` must be new for each check; `num_rules` is how long the system prompt is, at about 50 tokens each.
    """
    talk, num_before = conversation(session, num_rules=num_rules), None
    for number, step in enumerate(STEPS, 1):
        body = dialect.body(talk, model=model, step=step)
        listener = _Listener(dialect)
        await listener.ask(http, dialect.path, msgspec.json.encode(body))
        heard = listener.heard
        calls = tuple(heard.calls.values())
        yield TurnReport(
            dialect=dialect.name,
            number=number,
            expected=step.calls or "any",
            called=tuple(f"{call.name} {call.arguments}" for call in calls),
            num_prompt=heard.num_prompt,
            num_cached=heard.num_cached,
            ttft_ms=listener.ttft_ms,
            total_ms=listener.total_ms,
            problems=tuple(problems(heard, step, num_before=num_before)),
        )
        num_before = heard.num_prompt
        if step.calls is None or len(calls) != 1 or _call_problem(calls[0], step) is not None:
            break
        talk = talk.after(calls[0], step.result)


def problems(heard: Heard, step: Step, *, num_before: int | None) -> list[str]:
    """What is wrong with a turn. `num_before`: tokens of the prompt before."""
    if heard.error is not None:
        return [heard.error]
    found = []
    if not heard.is_complete:
        found.append("the stream did not end as it should")
    if step.calls is None:
        found += [] if heard.text.strip() or heard.calls else ["neither an answer nor a call"]
    elif len(heard.calls) != 1:
        found.append(f"{len(heard.calls)} calls instead of one")
    elif problem := _call_problem(next(iter(heard.calls.values())), step):
        found.append(problem)
    if heard.num_prompt is None:
        found.append("the tokens of the prompt are not counted")
    elif num_before is not None and heard.num_cached is not None and heard.num_cached < MIN_CACHED * num_before:
        found.append(f"only {heard.num_cached} of the {num_before} tokens of the turn before came from the cache")
    return found


def _call_problem(call: Call, step: Step) -> str | None:
    """What is wrong with a call, if anything is."""
    if call.name != step.calls:
        return f"called {call.name!r} instead of {step.calls!r}"
    if not call.call_id:
        return "the call has no id"
    try:
        arguments = msgspec.json.decode(call.arguments)
    except msgspec.DecodeError:
        return f"arguments are not JSON: {call.arguments[:80]!r}"
    wanted = next(tool.properties for tool in TOOLS if tool.name == call.name)
    if not isinstance(arguments, dict) or arguments.keys() != wanted.keys():
        return f"arguments are not {', '.join(wanted)}"
    wrong = [name for name, schema in wanted.items() if arguments[name] not in schema.get("enum", [arguments[name]])]
    return f"{wrong[0]} is not a value of its schema" if wrong else None


class _Listener:
    """One request and its stream."""

    def __init__(self, dialect: Dialect) -> None:
        self.heard = Heard()
        self.ttft_ms: float | None = None
        self.total_ms = 0.0
        self._dialect = dialect
        self._reader = EventReader()
        self._started_s = 0.0

    async def ask(self, http: HttpClient, path: str, body: bytes) -> None:
        """Send the request and listen to the end; what goes wrong is in `heard.error`."""
        self._started_s = time.perf_counter()
        try:
            answer = await http.request("POST", path, body=body, on_data=self._feed)
        except (ConnectionFailed, TimedOut, BrokenOff) as error:
            self.heard.error = str(error)
            return
        finally:
            self.total_ms = self._elapsed_ms()
        if not 200 <= answer.status < 300:
            self.heard.error = f"answered {answer.status}: {error_text(answer.body)}"

    def _feed(self, piece: bytes) -> None:
        for data in self._reader.feed(piece):
            if data != _DONE and self.heard.error is None:
                self._hear(data)
        if self.ttft_ms is None and (self.heard.text or self.heard.calls):
            self.ttft_ms = self._elapsed_ms()

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._started_s) * 1000

    def _hear(self, data: bytes) -> None:
        event: Any = None
        try:
            event = msgspec.json.decode(data)
            self._dialect.hear(event, self.heard)
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            kind = event.get("type", "an event") if isinstance(event, dict) else "an event"
            self.heard.error = f"{kind} is malformed: {type(error).__name__} {error}"
