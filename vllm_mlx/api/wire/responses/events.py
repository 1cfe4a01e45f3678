"""Events of a streamed response, in OpenAI's names. Every one carries its place in the stream."""

from __future__ import annotations

import msgspec

from vllm_mlx.api.wire.answers import TokenLogprobAnswer
from vllm_mlx.api.wire.responses.answers import OutputItem, OutputText, ReasoningText, ResponseAnswer, SummaryText


class StreamEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """One event; `type` is also the name of the server-sent event."""

    sequence_number: int
    """From 0, without gaps."""

    @property
    def kind(self) -> str:
        """Its `type`."""
        return str(self.__struct_config__.tag)


class _OfResponse(StreamEvent, frozen=True, kw_only=True):
    response: ResponseAnswer


class Created(_OfResponse, frozen=True, kw_only=True, tag="response.created"):
    """The first event."""


class Queued(_OfResponse, frozen=True, kw_only=True, tag="response.queued"):
    """A background response waits for its turn."""


class InProgress(_OfResponse, frozen=True, kw_only=True, tag="response.in_progress"):
    """Generation begins."""


class Completed(_OfResponse, frozen=True, kw_only=True, tag="response.completed"):
    """The last event: all was said."""


class Incomplete(_OfResponse, frozen=True, kw_only=True, tag="response.incomplete"):
    """The last event: the limit of output tokens was reached, or the response was cancelled."""


class Failed(_OfResponse, frozen=True, kw_only=True, tag="response.failed"):
    """The last event: the response's `error` says why."""


class _OfOutput(StreamEvent, frozen=True, kw_only=True):
    output_index: int


class ItemAdded(_OfOutput, frozen=True, kw_only=True, tag="response.output_item.added"):
    """An item begins."""

    item: OutputItem


class ItemDone(_OfOutput, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item is whole."""

    item: OutputItem


class _OfItem(_OfOutput, frozen=True, kw_only=True):
    item_id: str


class _OfContent(_OfItem, frozen=True, kw_only=True):
    content_index: int = 0


class PartAdded(_OfContent, frozen=True, kw_only=True, tag="response.content_part.added"):
    """A part of an item begins."""

    part: OutputText | ReasoningText


class PartDone(_OfContent, frozen=True, kw_only=True, tag="response.content_part.done"):
    """A part of an item is whole."""

    part: OutputText | ReasoningText


class OutputTextDelta(_OfContent, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """More text of a message."""

    delta: str
    logprobs: list[TokenLogprobAnswer] = []


class OutputTextDone(_OfContent, frozen=True, kw_only=True, tag="response.output_text.done"):
    """The text of a message."""

    text: str
    logprobs: list[TokenLogprobAnswer] = []


class ReasoningTextDelta(_OfContent, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """More of what the model thinks."""

    delta: str


class ReasoningTextDone(_OfContent, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """What the model thought."""

    text: str


class _OfSummary(_OfItem, frozen=True, kw_only=True):
    summary_index: int = 0


class SummaryPartAdded(_OfSummary, frozen=True, kw_only=True, tag="response.reasoning_summary_part.added"):
    """A part of a summary begins."""

    part: SummaryText


class SummaryPartDone(_OfSummary, frozen=True, kw_only=True, tag="response.reasoning_summary_part.done"):
    """A part of a summary is whole."""

    part: SummaryText


class SummaryTextDelta(_OfSummary, frozen=True, kw_only=True, tag="response.reasoning_summary_text.delta"):
    """More text of a summary."""

    delta: str


class SummaryTextDone(_OfSummary, frozen=True, kw_only=True, tag="response.reasoning_summary_text.done"):
    """The text of a summary."""

    text: str


class ArgumentsDelta(_OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """More of a call's arguments."""

    delta: str


class ArgumentsDone(_OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """A call's arguments."""

    name: str
    arguments: str


class CustomInputDelta(_OfItem, frozen=True, kw_only=True, tag="response.custom_tool_call_input.delta"):
    """More of a freeform tool's text."""

    delta: str


class CustomInputDone(_OfItem, frozen=True, kw_only=True, tag="response.custom_tool_call_input.done"):
    """A freeform tool's text."""

    input: str
