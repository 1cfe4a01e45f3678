"""One output item while it is written: which events each kind opens with, grows by and closes with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from vllm_mlx.api.wire.answers import TokenLogprobAnswer
from vllm_mlx.api.wire.freeform import FreeformReader
from vllm_mlx.api.wire.responses import events
from vllm_mlx.api.wire.responses.answers import (
    CustomToolCallItem,
    FunctionCallItem,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    SummaryText,
)
from vllm_mlx.api.wire.responses.tools import Origin

Unnumbered = Callable[..., events.StreamEvent]
"""An event that lacks its place in the stream: call it with `sequence_number`."""
Seal = Callable[[str], str]


class Writer(Protocol):
    """One item. `status` of the finished item is 'completed', or 'incomplete' if it was cut off."""

    id: str

    def opening(self) -> Iterator[Unnumbered]:
        """Events between the item's beginning and its text."""
        ...

    def growing(self, text: str, logprobs: Sequence[TokenLogprobAnswer]) -> Iterator[Unnumbered]:
        """Events for more text."""
        ...

    def closing(self, status: str) -> Iterator[Unnumbered]:
        """Events between the item's text and its end."""
        ...

    def item(self, status: str) -> OutputItem:
        """The item with what it has so far; with nothing while `status` is 'in_progress'."""
        ...


class _Text:
    """What the items have in common: a name, a place, and text that grows."""

    def __init__(self, item_id: str, output_index: int) -> None:
        self.id = item_id
        self._place = {"item_id": item_id, "output_index": output_index}
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """What was written so far."""
        return "".join(self._pieces)

    def _event(self, kind: Callable[..., events.StreamEvent], **fields: Any) -> Unnumbered:
        return functools.partial(kind, **self._place, **fields)


class MessageWriter(_Text):
    """What the model says."""

    def __init__(self, item_id: str, output_index: int) -> None:
        super().__init__(item_id, output_index)
        self._logprobs: list[TokenLogprobAnswer] = []

    def opening(self) -> Iterator[Unnumbered]:
        """An empty part."""
        yield self._event(events.PartAdded, part=OutputText(""))

    def growing(self, text: str, logprobs: Sequence[TokenLogprobAnswer]) -> Iterator[Unnumbered]:
        """A piece of text."""
        self._pieces.append(text)
        self._logprobs += logprobs
        if text or logprobs:
            yield self._event(events.OutputTextDelta, delta=text, logprobs=list(logprobs))

    def closing(self, status: str) -> Iterator[Unnumbered]:
        """The text, then the part."""
        part = self._part()
        yield self._event(events.OutputTextDone, text=part.text, logprobs=part.logprobs)
        yield self._event(events.PartDone, part=part)

    def item(self, status: str) -> MessageItem:
        """The message."""
        return MessageItem(self.id, status, [] if status == "in_progress" else [self._part()])

    def _part(self) -> OutputText:
        return OutputText(self.text, logprobs=self._logprobs)


class ReasoningWriter(_Text):
    """What the model thinks: as `summary` if the client asked for one, as `content` otherwise."""

    def __init__(self, item_id: str, output_index: int, *, has_summary: bool, seal: Seal | None) -> None:
        super().__init__(item_id, output_index)
        self._has_summary = has_summary
        self._seal = seal

    def opening(self) -> Iterator[Unnumbered]:
        """An empty part."""
        if self._has_summary:
            yield self._event(events.SummaryPartAdded, part=SummaryText(""))
        else:
            yield self._event(events.PartAdded, part=ReasoningText(""))

    def growing(self, text: str, logprobs: Sequence[TokenLogprobAnswer]) -> Iterator[Unnumbered]:
        """A piece of text; log-probabilities are of answers only."""
        self._pieces.append(text)
        yield self._event(events.SummaryTextDelta if self._has_summary else events.ReasoningTextDelta, delta=text)

    def closing(self, status: str) -> Iterator[Unnumbered]:
        """The text, then the part."""
        text = self.text
        if self._has_summary:
            yield self._event(events.SummaryTextDone, text=text)
            yield self._event(events.SummaryPartDone, part=SummaryText(text))
        else:
            yield self._event(events.ReasoningTextDone, text=text)
            yield self._event(events.PartDone, part=ReasoningText(text))

    def item(self, status: str) -> ReasoningItem:
        """The reasoning, sealed too if the client will bring it back."""
        if status == "in_progress":
            return ReasoningItem(self.id, status, [])
        text = self.text
        sealed = self._seal(text) if self._seal else None
        if self._has_summary:
            return ReasoningItem(self.id, status, [SummaryText(text)], encrypted_content=sealed)
        return ReasoningItem(self.id, status, [], [ReasoningText(text)], encrypted_content=sealed)


class FunctionCallWriter(_Text):
    """A call of a function."""

    def __init__(self, item_id: str, output_index: int, *, call_id: str, origin: Origin) -> None:
        super().__init__(item_id, output_index)
        self._call_id = call_id
        self._origin = origin

    def opening(self) -> Iterator[Unnumbered]:
        """Nothing: the item itself says which function."""
        return iter(())

    def growing(self, text: str, logprobs: Sequence[TokenLogprobAnswer]) -> Iterator[Unnumbered]:
        """A piece of the arguments."""
        if text:
            self._pieces.append(text)
            yield self._event(events.ArgumentsDelta, delta=text)

    def closing(self, status: str) -> Iterator[Unnumbered]:
        """The arguments."""
        yield self._event(events.ArgumentsDone, name=self._origin.name, arguments=self.text)

    def item(self, status: str) -> FunctionCallItem:
        """The call."""
        space = self._origin.namespace or msgspec.UNSET
        return FunctionCallItem(self.id, status, self._call_id, self._origin.name, self.text, space)


class CustomCallWriter(_Text):
    """A call of a freeform tool, whose text comes as the one argument of a function."""

    def __init__(self, item_id: str, output_index: int, *, call_id: str, origin: Origin) -> None:
        super().__init__(item_id, output_index)
        self._call_id = call_id
        self._origin = origin
        self._reader = FreeformReader()

    def opening(self) -> Iterator[Unnumbered]:
        """Nothing: the item itself says which tool."""
        return iter(())

    def growing(self, text: str, logprobs: Sequence[TokenLogprobAnswer]) -> Iterator[Unnumbered]:
        """A piece of the text, if this much of the arguments has one."""
        yield from self._more(self._reader.more(text))

    def closing(self, status: str) -> Iterator[Unnumbered]:
        """The text."""
        yield from self._more(self._reader.rest())
        yield self._event(events.CustomInputDone, input=self._reader.text)

    def item(self, status: str) -> CustomToolCallItem:
        """The call."""
        space = self._origin.namespace or msgspec.UNSET
        text = self._reader.text
        return CustomToolCallItem(self.id, status, self._call_id, self._origin.name, text, space)

    def _more(self, text: str) -> Iterator[Unnumbered]:
        if text:
            yield self._event(events.CustomInputDelta, delta=text)
