"""From turns of blocks to the messages of a chat request."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence

from vllm_mlx.api.wire.anthropic.blocks import (
    Block,
    CacheControl,
    DocumentBlock,
    PdfSource,
    RedactedThinkingBlock,
    ResultPart,
    SearchResultBlock,
    System,
    TextBlock,
    TextSource,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    WireMessage,
    keep_s,
)
from vllm_mlx.chat.pdf import pdf_text
from vllm_mlx.core.chat import Message, TextPart, ToolCall
from vllm_mlx.core.errors import InvalidRequest

Unseal = Callable[[str], str | None]
"""A signature, or redacted reasoning -> the reasoning in it; None if this server did not seal it."""


def messages_of(turns: Sequence[WireMessage], *, system: System | None, unseal: Unseal) -> tuple[Message, ...]:
    """The conversation. Raises InvalidRequest for blocks that their role cannot have.

    System text and the system turns at the beginning are one message; so are turns of one side that follow each other,
    as Anthropic reads them. Results come before the text that is sent with them, in the order of the turn.
    """
    writer = _Writer(unseal)
    if system:
        writer.system(system)
    for position, turn in enumerate(turns):
        blocks = [TextBlock(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        writer.turn(turn.role, blocks, path=f"messages.{position}.content")
    return writer.finished()


class _Turn:
    """A message while it may grow."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.parts: list[TextPart] = []
        self.thoughts: list[str] = []
        self.calls: list[ToolCall] = []
        self.keep_s: int | None = None

    def mark(self, control: CacheControl | None) -> None:
        """Note that others will go on from its end, if that was said."""
        if control is not None:
            self.keep_s = max(self.keep_s or 0, keep_s(control))

    def message(self) -> Message:
        """The message as it is."""
        return Message(
            self.role,
            tuple(self.parts) or None,
            reasoning="\n".join(self.thoughts) if self.thoughts else None,
            tool_calls=tuple(self.calls),
            is_breakpoint=self.keep_s is not None,
            keep_s=self.keep_s or 0,
        )


class _Writer:
    """Puts messages together, turn by turn."""

    def __init__(self, unseal: Unseal) -> None:
        self._unseal = unseal
        self._names: dict[str, str] = {}
        self._messages: list[Message] = []
        self._open: _Turn | None = None

    def finished(self) -> tuple[Message, ...]:
        self._close()
        return tuple(self._messages)

    def system(self, content: System) -> None:
        blocks = [TextBlock(type="text", text=content)] if isinstance(content, str) else content
        for block in blocks:
            self._text("system", block.text, block.cache_control)

    def turn(self, role: str, blocks: Sequence[Block], *, path: str) -> None:
        has_part = False
        for position, block in enumerate(blocks):
            self._block(role, block, path=f"{path}.{position}")
            has_part = has_part or not isinstance(block, RedactedThinkingBlock)
        if not has_part and role == "user":
            self._text(role, "", None)

    def _block(self, role: str, block: Block, *, path: str) -> None:
        match block:
            case TextBlock():
                self._text(role, block.text, block.cache_control)
            case DocumentBlock() | SearchResultBlock() if role == "user":
                self._text(role, plain(block, path=path), block.cache_control)
            case ToolResultBlock() if role == "user":
                self._result(block, path=path)
            case ThinkingBlock() if role == "assistant":
                self._thought(block.thinking or self._unseal(block.signature or "") or "")
            case RedactedThinkingBlock() if role == "assistant":
                self._thought(self._unseal(block.data) or "")
            case ToolUseBlock() if role == "assistant":
                self._called(block)
            case _:
                raise InvalidRequest(f"{path}: a turn of the {role} has no blocks of type '{block.type}'.", param=path)

    def _close(self) -> None:
        if self._open is not None:
            self._messages.append(self._open.message())
            self._open = None

    def _growing(self, role: str) -> _Turn:
        """The open message, if it is of this role, or a new one."""
        if self._open is None or self._open.role != role:
            self._close()
            self._open = _Turn(role)
        return self._open

    def _text(self, role: str, text: str, control: CacheControl | None) -> None:
        if self._open is not None and self._open.calls:  # templates write a message's text before its calls
            self._close()
        turn = self._growing(role)
        turn.parts.append(TextPart(text))
        turn.mark(control)

    def _result(self, block: ToolResultBlock, *, path: str) -> None:
        content = block.content or ""
        texts = (
            [content]
            if isinstance(content, str)
            else [plain(part, path=f"{path}.content.{position}") for position, part in enumerate(content)]
        )
        if block.is_error and not (texts and texts[0].lower().startswith("error")):
            texts = [f"Error: {texts[0]}" if texts and texts[0] else "Error", *texts[1:]]
        self._close()
        message = Message(
            "tool",
            texts[0] if len(texts) == 1 else tuple(map(TextPart, texts)),
            self._names.get(block.tool_use_id),
            tool_call_id=block.tool_use_id,
            is_breakpoint=block.cache_control is not None,
            keep_s=keep_s(block.cache_control),
        )
        self._messages.append(message)

    def _thought(self, text: str) -> None:
        # Reasoning between two calls of one turn stays with the first: templates have one place for it in a turn.
        if text:
            self._growing("assistant").thoughts.append(text)

    def _called(self, block: ToolUseBlock) -> None:
        self._names[block.id] = block.name
        turn = self._growing("assistant")
        turn.calls.append(ToolCall(block.id, block.name, json.dumps(block.input, ensure_ascii=False)))
        turn.mark(block.cache_control)


def plain(block: ResultPart, *, path: str) -> str:
    """What the model reads of a block; `path` is its place in the body. Raises InvalidRequest for unreadable files."""
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, SearchResultBlock):
        return _titled(block.title, f"Source: {block.source}", _joined(block.content))
    match block.source:
        case TextSource(data=text):
            pass
        case PdfSource(data=data):
            text = pdf_text(_decoded(data, param=f"{path}.source.data"), param=f"{path}.source")
        case source:
            text = _joined(source.content)
    return _titled(block.title, block.context, text)


def has_files(turns: Iterable[WireMessage]) -> bool:
    """Whether reading the turns takes so long that it needs a thread."""
    blocks = [block for turn in turns if not isinstance(turn.content, str) for block in turn.content]
    parts = [part for block in blocks if isinstance(block, ToolResultBlock) for part in block.content or ()]
    return any(isinstance(block, DocumentBlock) and isinstance(block.source, PdfSource) for block in (*blocks, *parts))


def _decoded(data: str, *, param: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise InvalidRequest(f"{param} is not base64.", param=param) from error


def _joined(content: str | Iterable[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _titled(*parts: str | None) -> str:
    """A document's parts, marked off from what is around it."""
    shown = "\n".join(part for part in parts if part)
    return f"<document>\n{shown}\n</document>"
