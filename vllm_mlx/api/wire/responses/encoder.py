"""Events of a chat request to the stream of a response; the response without a stream is what that stream ends with."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from vllm_mlx.api.wire.answers import TokenLogprobAnswer
from vllm_mlx.api.wire.chat_encoder import token_answer
from vllm_mlx.api.wire.responses import events
from vllm_mlx.api.wire.responses.answers import (
    IncompleteDetails,
    InputTokensDetails,
    OutputItem,
    OutputTokensDetails,
    ResponseAnswer,
    ResponseError,
    ResponseUsage,
)
from vllm_mlx.api.wire.responses.tools import NO_TOOLS, OfferedTools, Origin
from vllm_mlx.api.wire.responses.writers import (
    CustomCallWriter,
    FunctionCallWriter,
    MessageWriter,
    ReasoningWriter,
    Seal,
    Unnumbered,
    Writer,
)
from vllm_mlx.api.wire.usage import Cache
from vllm_mlx.core.errors import RequestError
from vllm_mlx.core.events import Event, Finish, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from vllm_mlx.core.messages import FinishReason


class ResponseEncoder:
    """One response. Items come one after the other: what the model does next ends what it did before."""

    def __init__(
        self,
        head: ResponseAnswer,
        *,
        offered: OfferedTools = NO_TOOLS,
        has_summary: bool = False,
        seal: Seal | None = None,
    ) -> None:
        """`head` is the response before anything of it is written. `seal` makes the reasoning that comes back."""
        self._answer = head
        self._offered = offered
        self._has_summary = has_summary
        self._seal = seal
        self._items: list[OutputItem] = []
        self._writer: Writer | None = None
        self._call: int | None = None
        self._held: list[TextDelta] = []
        self._num_events = 0

    @property
    def answer(self) -> ResponseAnswer:
        """The response so far."""
        return msgspec.structs.replace(self._answer, output=list(self._items))

    @property
    def is_ended(self) -> bool:
        """Whether the last event was given out."""
        return self._answer.status not in ("queued", "in_progress")

    def opening(self) -> Iterator[events.StreamEvent]:
        """The events before anything is generated."""
        yield self._numbered(events.Created, response=self.answer)
        if self._answer.status == "queued":
            yield self._numbered(events.Queued, response=self.answer)
            self._answer = msgspec.structs.replace(self._answer, status="in_progress")
        yield self._numbered(events.InProgress, response=self.answer)

    def chunks(self, event: Event) -> Iterator[events.StreamEvent]:
        """The stream's events for one event of the service; after its `Finish`, `ending` follows."""
        match event:
            case ReasoningDelta() if event.text:
                yield from self._grow(ReasoningWriter, event.text, ())
            case TextDelta() if event.text or event.tokens:
                yield from self._say(event)
            case ToolCallDelta():
                yield from self._call_more(event)
            case Finish():
                yield from self._finish(event)

    def ending(self, cache: Cache = msgspec.UNSET) -> Iterator[events.StreamEvent]:
        """The last event."""
        self._answer = msgspec.structs.replace(self._answer, cache=cache)
        kind = events.Incomplete if self._answer.status == "incomplete" else events.Completed
        yield self._numbered(kind, response=self.answer)

    def failing(self, error: RequestError) -> Iterator[events.StreamEvent]:
        """The last event of a response that an error ended; what was written stays in it."""
        yield from self._close("incomplete")
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        told = ResponseError(code, error.message, error.param, error.type)
        self._answer = msgspec.structs.replace(self._answer, status="failed", error=told)
        yield self._numbered(events.Failed, response=self.answer)

    def cancelling(self) -> Iterator[events.StreamEvent]:
        """The last events of a response that ends where it is. The API has none for `cancelled`, a status alone."""
        yield from self._close("incomplete")
        self._answer = msgspec.structs.replace(self._answer, status="cancelled")
        yield self._numbered(events.Incomplete, response=self.answer)

    def _say(self, event: TextDelta) -> Iterator[events.StreamEvent]:
        """Text of the answer. White space alone begins no message: it stands between other items."""
        self._held.append(event)
        if isinstance(self._writer, MessageWriter) or event.text.strip():
            yield from self._say_held()

    def _say_held(self) -> Iterator[events.StreamEvent]:
        held, self._held = self._held, []
        logprobs = [token_answer(token) for delta in held for token in delta.tokens]
        yield from self._grow(MessageWriter, "".join(delta.text for delta in held), logprobs)

    def _grow(
        self, kind: type[MessageWriter | ReasoningWriter], text: str, logprobs: Sequence[TokenLogprobAnswer]
    ) -> Iterator[events.StreamEvent]:
        if not isinstance(self._writer, kind):
            yield from self._close("completed")
            yield from self._open(self._new(kind))
        assert self._writer is not None
        yield from self._number(self._writer.growing(text, logprobs))

    def _new(self, kind: type[MessageWriter | ReasoningWriter]) -> Writer:
        place = len(self._items)
        if kind is MessageWriter:
            return MessageWriter(self._item_id("msg"), place)
        return ReasoningWriter(self._item_id("rs"), place, has_summary=self._has_summary, seal=self._seal)

    def _call_more(self, event: ToolCallDelta) -> Iterator[events.StreamEvent]:
        if event.index != self._call or self._writer is None:
            yield from self._close("completed")
            yield from self._open(self._new_call(event))
            self._call = event.index
        assert self._writer is not None
        yield from self._number(self._writer.growing(event.arguments, ()))

    def _new_call(self, event: ToolCallDelta) -> Writer:
        name = event.name or ""
        origin = self._offered.origins.get(name, Origin(name))
        place, call_id = len(self._items), event.id or f"call_{self._answer.id.removeprefix('resp_')}{event.index}"
        if origin.is_freeform:
            return CustomCallWriter(self._item_id("ctc"), place, call_id=call_id, origin=origin)
        return FunctionCallWriter(self._item_id("fc"), place, call_id=call_id, origin=origin)

    def _finish(self, event: Finish) -> Iterator[events.StreamEvent]:
        is_cut = event.reason is FinishReason.LENGTH
        status = "incomplete" if is_cut else "completed"
        if self._writer is None and not self._items:  # an empty answer is an answer
            yield from self._say_held()
        yield from self._close(status)
        self._answer = msgspec.structs.replace(
            self._answer,
            status=status,
            incomplete_details=IncompleteDetails("max_output_tokens") if is_cut else None,
            completed_at=None if is_cut else int(time.time()),
            usage=_usage(event.usage),
        )

    def _open(self, writer: Writer) -> Iterator[events.StreamEvent]:
        self._writer, self._held = writer, []
        place = len(self._items)
        yield self._numbered(events.ItemAdded, output_index=place, item=writer.item("in_progress"))
        yield from self._number(writer.opening())

    def _close(self, status: str) -> Iterator[events.StreamEvent]:
        writer, self._writer, self._call = self._writer, None, None
        if writer is None:
            return
        yield from self._number(writer.closing(status))
        item = writer.item(status)
        self._items.append(item)
        yield self._numbered(events.ItemDone, output_index=len(self._items) - 1, item=item)

    def _number(self, unnumbered: Iterable[Unnumbered]) -> Iterator[events.StreamEvent]:
        for make in unnumbered:
            yield self._numbered(make)

    def _numbered(self, make: Unnumbered, **fields: object) -> events.StreamEvent:
        number = self._num_events
        self._num_events += 1
        return make(sequence_number=number, **fields)

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._answer.id.removeprefix('resp_')}{len(self._items):02x}"


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(usage.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(usage.reasoning_tokens),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )
