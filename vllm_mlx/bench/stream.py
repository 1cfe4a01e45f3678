"""Reads a streamed answer and notes when each piece came."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_mlx.bench.sample import Failure, FailureKind, Sample, ToolCall
from vllm_mlx.bench.sse import EventReader

DONE = b"[DONE]"
_MAX_SHOWN = 200


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolPiece(msgspec.Struct):
    index: int | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolPiece] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class StreamRecorder:
    """Takes the bytes of one stream of chat or text completion chunks; one choice is expected.

    `now` gives seconds. `feed` never raises: what is wrong ends up in the sample's failure.
    """

    def __init__(self, started_s: float, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._started_s = started_s
        self._reader = EventReader()
        self._decode = msgspec.json.Decoder(_Event).decode
        self._times: list[float] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[list[str], list[str]]] = {}
        self._usage = _Usage()
        self._finish_reason: str | None = None
        self._is_done = False
        self._failure: Failure | None = None

    def feed(self, piece: bytes) -> None:
        """Bytes of the body that arrived just now."""
        at = self._now()
        for data in self._reader.feed(piece):
            if data == DONE:
                self._is_done = True
            else:
                self._take(data, at)

    def sample(self, failure: Failure | None, *, origin_s: float = 0.0) -> Sample:
        """Everything, at the end. `failure`: of the transport; `origin_s`: where the load's clock began."""
        times, started_s = self._times, self._started_s
        details = self._usage.prompt_tokens_details
        return Sample(
            started_s=started_s - origin_s,
            e2e_s=self._now() - started_s,
            ttft_s=times[0] - started_s if times else None,
            last_s=times[-1] - started_s if times else None,
            gaps_s=tuple(after - before for before, after in itertools.pairwise(times)),
            num_chunks=len(times),
            usage_prompt_tokens=self._usage.prompt_tokens,
            usage_completion_tokens=self._usage.completion_tokens,
            cached_tokens=details.cached_tokens if details else None,
            finish_reason=self._finish_reason,
            content="".join(self._content),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(ToolCall("".join(n), "".join(a)) for _, (n, a) in sorted(self._calls.items())),
            failure=self._failure or failure or self._incomplete(),
        )

    def _incomplete(self) -> Failure | None:
        if self._finish_reason is None:
            return Failure(FailureKind.BROKEN_STREAM, "the stream ended without a finish_reason")
        if not self._is_done:
            return Failure(FailureKind.BROKEN_STREAM, "the stream ended without [DONE]")
        return None

    def _take(self, data: bytes, at: float) -> None:
        try:
            event = self._decode(data)
        except msgspec.DecodeError as error:
            self._fail(FailureKind.MALFORMED, f"{error}: {data[:_MAX_SHOWN].decode(errors='replace')}")
            return
        if event.error is not None:
            self._fail(FailureKind.ERROR_EVENT, message_of(event.error))
        if event.usage is not None:
            self._usage = event.usage
        for choice in event.choices or ():
            self._take_choice(choice, at)

    def _take_choice(self, choice: _Choice, at: float) -> None:
        delta = choice.delta or _Delta(content=choice.text)
        reasoning = delta.reasoning_content or delta.reasoning
        if delta.content:
            self._content.append(delta.content)
        if reasoning:
            self._reasoning.append(reasoning)
        for position, call in enumerate(delta.tool_calls or ()):
            self._take_call(position if call.index is None else call.index, call.function or _Function())
        if delta.content or reasoning or delta.tool_calls:
            self._times.append(at)
        if choice.finish_reason:
            self._finish_reason = choice.finish_reason

    def _take_call(self, index: int, function: _Function) -> None:
        names, arguments = self._calls.setdefault(index, ([], []))
        names.append(function.name or "")
        arguments.append(function.arguments or "")

    def _fail(self, kind: FailureKind, message: str) -> None:
        if self._failure is None:
            self._failure = Failure(kind, message)


def message_of(error: Any) -> str:
    """The words of an error object in any of the usual shapes: `{"message": ...}`, `{"detail": ...}`, text."""
    if isinstance(error, dict):
        for key in ("message", "detail", "error"):
            if error.get(key):
                return message_of(error[key])
    return error if isinstance(error, str) else str(error)
