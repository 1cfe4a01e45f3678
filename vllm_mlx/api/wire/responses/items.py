"""Input items of a response, as clients send them and as the store gives them back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_mlx.api.wire.base import WireModel, unsupported

_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")

Status = Literal["in_progress", "completed", "incomplete"]
Caller = Annotated[dict[str, Any], Field(max_length=2)]


class TextPiece(WireModel):
    """A piece of text."""

    type: Literal["input_text", "output_text", "text"]
    """The kind of this part; all three are plain text."""
    text: str
    """The text itself."""
    annotations: list[Any] | None = None
    """Accepted, as it comes back in replayed answers; not shown to the model."""
    logprobs: list[Any] | None = None
    """Accepted, as it comes back in replayed answers; not shown to the model."""
    prompt_cache_breakpoint: Any = None
    """Marks the end of the message as a beginning that others share."""


class RefusalPiece(WireModel):
    """A refusal of an earlier answer; the model reads it as text."""

    type: Literal["refusal"]
    """The kind of this part."""
    refusal: str
    """What was said."""


def _text_only(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in _TEXT_PARTS:
        raise unsupported(f"has type '{kind[:40]}', but this model takes text only")
    return part


Piece = Annotated[TextPiece | RefusalPiece, Field(discriminator="type"), BeforeValidator(_text_only)]
Content = str | list[Piece]


class MessageInput(WireModel):
    """A message of either side."""

    type: Literal["message"] = "message"
    """May be left out."""
    role: Literal["user", "assistant", "system", "developer"]
    """`developer` is the newer name of `system`."""
    content: Content
    """Text, or a list of text parts."""
    id: str | None = None
    """Given to it by this server or the client; kept."""
    status: Status | None = None
    """Accepted; not shown to the model."""
    phase: Literal["commentary", "final_answer"] | None = None
    """Accepted; not shown to the model."""


class ReasoningPiece(WireModel):
    """Text of a reasoning item."""

    type: Literal["reasoning_text", "summary_text", "text"]
    """The kind of this part."""
    text: str
    """The text itself."""


class ReasoningInput(WireModel):
    """What the model thought earlier. `encrypted_content` wins over `content`, and that over `summary`."""

    type: Literal["reasoning"]
    """`reasoning`."""
    summary: list[ReasoningPiece] = []
    """Read where there is nothing else."""
    content: list[ReasoningPiece] | None = None
    """The reasoning in plain text."""
    encrypted_content: str | None = None
    """As this server gave it out; anything else is refused."""
    id: str | None = None
    """Kept."""
    status: Status | None = None
    """Accepted; not shown to the model."""


class FunctionCallInput(WireModel):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    """`function_call`."""
    call_id: str
    """What the output refers to."""
    name: str
    """Name of the function."""
    arguments: str
    """Its arguments, as JSON text."""
    namespace: str | None = None
    """Namespace of the function, if it has one."""
    id: str | None = None
    """Kept."""
    status: Status | None = None
    """Accepted; not shown to the model."""
    caller: Caller | None = None
    """Accepted; not shown to the model."""


class FunctionCallOutput(WireModel):
    """What a function answered."""

    type: Literal["function_call_output"]
    """`function_call_output`."""
    call_id: str
    """The call that this answers."""
    output: Content
    """Text, or a list of text parts."""
    name: str | None = None
    """Name of the function, for templates that show it."""
    namespace: str | None = None
    """Accepted; the call has it."""
    id: str | None = None
    """Kept."""
    status: Status | None = None
    """Accepted; not shown to the model."""
    caller: Caller | None = None
    """Accepted; not shown to the model."""


class CustomToolCallInput(WireModel):
    """A call of a freeform tool that the model made earlier."""

    type: Literal["custom_tool_call"]
    """`custom_tool_call`."""
    call_id: str
    """What the output refers to."""
    name: str
    """Name of the tool."""
    input: str
    """The text that it was given."""
    namespace: str | None = None
    """Namespace of the tool, if it has one."""
    id: str | None = None
    """Kept."""
    status: Status | None = None
    """Accepted; not shown to the model."""
    caller: Caller | None = None
    """Accepted; not shown to the model."""


class CustomToolCallOutput(WireModel):
    """What a freeform tool answered."""

    type: Literal["custom_tool_call_output"]
    """`custom_tool_call_output`."""
    call_id: str
    """The call that this answers."""
    output: Content
    """Text, or a list of text parts."""
    name: str | None = None
    """Name of the tool, for templates that show it."""
    id: str | None = None
    """Kept."""
    status: Status | None = None
    """Accepted; not shown to the model."""
    caller: Caller | None = None
    """Accepted; not shown to the model."""


class ItemReference(WireModel):
    """Stands for a stored item."""

    type: Literal["item_reference"]
    """`item_reference`."""
    id: str
    """Id of an item of a stored response or conversation."""


ResolvedItem = (
    MessageInput | ReasoningInput | FunctionCallInput | FunctionCallOutput | CustomToolCallInput | CustomToolCallOutput
)
"""An item that says all it means."""

_KINDS = (
    "message",
    "reasoning",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "item_reference",
)


def _known_kind(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    kind = item.get("type")
    if kind is None:
        # OpenAI lets both be shortened: a message is known by its role, a reference by having nothing but an id.
        kind = "message" if "role" in item or "id" not in item else "item_reference"
        return {**item, "type": kind}
    if isinstance(kind, str) and kind not in _KINDS:
        raise unsupported(f"has type '{kind[:40]}', which this server does not take")
    return item


InputItem = Annotated[ResolvedItem | ItemReference, Field(discriminator="type"), BeforeValidator(_known_kind)]


def text_of(content: Content) -> str | tuple[str, ...]:
    """The text, or the texts of the parts."""
    if isinstance(content, str):
        return content
    return tuple(part.refusal if isinstance(part, RefusalPiece) else part.text for part in content)


def is_marked(content: Content) -> bool:
    """Whether a part says that others will go on from here."""
    return not isinstance(content, str) and any(
        isinstance(part, TextPiece) and part.prompt_cache_breakpoint is not None for part in content
    )
