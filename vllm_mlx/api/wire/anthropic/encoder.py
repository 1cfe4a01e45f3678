"""Events of a chat request to the stream of a message; the whole message is what that stream adds up to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import msgspec
import pydantic_core

from vllm_mlx.api.wire.anthropic import answers
from vllm_mlx.api.wire.anthropic.answers import AnyDelta, BlockAnswer, MessageAnswer, StreamEvent
from vllm_mlx.api.wire.anthropic.usage import Kept, usage_answer
from vllm_mlx.core.events import Event, Finish, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from vllm_mlx.core.messages import FinishReason

Shown = Literal["all", "signature", "nothing"]
"""What clients see of the reasoning."""
Sign = Callable[[str], str]
"""Reasoning -> its signature."""


class MessageEncoder:
    """One message. Blocks come one after the other: what the model does next ends what it did before."""

    def __init__(
        self,
        message_id: str,
        model: str,
        *,
        max_tokens: int,
        sign: Sign,
        shows: Shown = "all",
        edits: answers.EditsAnswer | msgspec.UnsetType = msgspec.UNSET,
    ) -> None:
        """`max_tokens`: what the request asked for. An answer that is cut off before that has filled the context."""
        self._max_tokens = max_tokens
        self._sign = sign
        self._shows = shows
        self._blocks: list[BlockAnswer] = []
        self._open: _Block | None = None
        self._call: int | None = None
        self._held = ""
        self._kept: tuple[Kept, ...] = ()
        self._answer = MessageAnswer(message_id, model, [], usage_answer(Usage(), ()), context_management=edits)

    @property
    def answer(self) -> MessageAnswer:
        """The message so far."""
        return msgspec.structs.replace(self._answer, content=list(self._blocks))

    def opening(self, usage: Usage, kept: Sequence[Kept]) -> Iterator[StreamEvent]:
        """The events before anything is generated; `usage` has the prompt's counts.

        At the start all that was not found is input: what of it is kept is told at the end. Clients that look at the
        start alone then know how long the prompt is.
        """
        self._kept = tuple(kept)
        self._answer = msgspec.structs.replace(self._answer, usage=usage_answer(usage, self._kept))
        start = msgspec.structs.replace(self.answer, usage=usage_answer(usage, ()), context_management=msgspec.UNSET)
        yield answers.MessageStart(start)
        yield answers.Ping()

    def chunks(self, event: Event) -> Iterator[StreamEvent]:
        """The stream's events for one event of the service; after its `Finish`, `ending` follows."""
        match event:
            case ReasoningDelta() if event.text and self._shows != "nothing":
                yield from self._grow(_Thinking, event.text)
            case TextDelta() if event.text:
                yield from self._say(event.text)
            case ToolCallDelta():
                yield from self._call_more(event)
            case Finish():
                yield from self._finish(event)

    def ending(self, diagnostics: answers.DiagnosticsAnswer | msgspec.UnsetType) -> Iterator[StreamEvent]:
        """The last events."""
        self._answer = msgspec.structs.replace(self._answer, diagnostics=diagnostics)
        end = self._answer
        delta = answers.StopDelta(end.stop_reason, end.stop_sequence)
        yield answers.MessageDelta(delta, end.usage, end.context_management, diagnostics)
        yield answers.MessageStop()

    def _say(self, text: str) -> Iterator[StreamEvent]:
        """Text of the answer. White space alone begins no block: it stands between others."""
        self._held += text
        if isinstance(self._open, _Text) or text.strip():
            held, self._held = self._held, ""
            yield from self._grow(_Text, held)

    def _grow(self, kind: type[_Text | _Thinking], text: str) -> Iterator[StreamEvent]:
        if not isinstance(self._open, kind):
            yield from self._close()
            yield from self._begin(_Text() if kind is _Text else _Thinking(self._sign, is_shown=self._shows == "all"))
        yield from self._more(text)

    def _call_more(self, event: ToolCallDelta) -> Iterator[StreamEvent]:
        if event.index != self._call or self._open is None:
            yield from self._close()
            yield from self._begin(_ToolUse(_own_id(event.id or ""), event.name or ""))
            self._call = event.index
        yield from self._more(event.arguments)

    def _finish(self, event: Finish) -> Iterator[StreamEvent]:
        yield from self._close()
        self._answer = msgspec.structs.replace(
            self._answer,
            stop_reason=self._reason(event),
            stop_sequence=event.stop_string,
            usage=usage_answer(event.usage, self._kept),
        )

    def _reason(self, event: Finish) -> str:
        if event.reason is FinishReason.LENGTH:
            has_all = event.usage.completion_tokens >= self._max_tokens
            return "max_tokens" if has_all else "model_context_window_exceeded"
        if event.stop_string is not None:
            return "stop_sequence"
        return "tool_use" if any(isinstance(block, answers.ToolUseAnswer) for block in self._blocks) else "end_turn"

    def _begin(self, block: _Block) -> Iterator[StreamEvent]:
        self._open, self._held = block, ""
        yield answers.BlockStart(len(self._blocks), block.answer(is_whole=False))

    def _more(self, text: str) -> Iterator[StreamEvent]:
        assert self._open is not None
        if text and (delta := self._open.more(text)) is not None:
            yield answers.BlockDelta(len(self._blocks), delta)

    def _close(self) -> Iterator[StreamEvent]:
        block, self._open, self._call = self._open, None, None
        if block is None:
            return
        index = len(self._blocks)
        if (delta := block.last()) is not None:
            yield answers.BlockDelta(index, delta)
        self._blocks.append(block.answer(is_whole=True))
        yield answers.BlockStop(index)


class _Block:
    """One block while it is written."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def more(self, text: str) -> AnyDelta | None:
        """What is sent for more text."""
        self._pieces.append(text)
        return self._delta(text)

    def last(self) -> AnyDelta | None:
        """What is sent before the end."""
        return None

    def answer(self, *, is_whole: bool) -> BlockAnswer:
        """The block, empty as long as it is not whole."""
        raise NotImplementedError

    def _delta(self, text: str) -> AnyDelta | None:
        raise NotImplementedError


class _Text(_Block):
    def answer(self, *, is_whole: bool) -> BlockAnswer:
        return answers.TextAnswer(self.text if is_whole else "")

    def _delta(self, text: str) -> AnyDelta | None:
        return answers.TextDelta(text)


class _Thinking(_Block):
    def __init__(self, sign: Sign, *, is_shown: bool) -> None:
        super().__init__()
        self._sign, self._is_shown = sign, is_shown
        self._signature = ""

    def last(self) -> AnyDelta | None:
        self._signature = self._sign(self.text)
        return answers.SignatureDelta(self._signature)

    def answer(self, *, is_whole: bool) -> BlockAnswer:
        return answers.ThinkingAnswer(self.text if is_whole and self._is_shown else "", self._signature)

    def _delta(self, text: str) -> AnyDelta | None:
        return answers.ThinkingDelta(text) if self._is_shown else None


class _ToolUse(_Block):
    def __init__(self, call_id: str, name: str) -> None:
        super().__init__()
        self._id, self._name = call_id, name

    def answer(self, *, is_whole: bool) -> BlockAnswer:
        return answers.ToolUseAnswer(self._id, self._name, _object(self.text) if is_whole else {})

    def _delta(self, text: str) -> AnyDelta | None:
        return answers.InputJsonDelta(text)


def _own_id(call_id: str) -> str:
    return f"toolu_{call_id.removeprefix('call_')}" if call_id.startswith("call_") else call_id


def _object(text: str) -> dict[str, Any]:
    """The input of a call; of one that was cut off, what is whole of it."""
    try:
        value = pydantic_core.from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
