"""From turns of blocks to the messages of a chat request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from vllm_mlx.api.wire.anthropic.blocks import (
    Block,
    DocumentBlock,
    PdfSource,
    RedactedThinkingBlock,
    SearchResultBlock,
    System,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    WireMessage,
)
from vllm_mlx.api.wire.anthropic.cache_control import CacheControl, keep_s
from vllm_mlx.api.wire.anthropic.offer import placed_blocks, result_parts
from vllm_mlx.api.wire.anthropic.texts import ReadPdf, Texts
from vllm_mlx.chat.pdf import pdf_text
from vllm_mlx.core.chat import Message, TextPart, Tool, ToolCall
from vllm_mlx.core.errors import InvalidRequest

Unseal = Callable[[str], str | None]
"""A signature, or redacted reasoning -> the reasoning in it; None if this server did not seal it."""


def messages_of(
    turns: Sequence[WireMessage],
    *,
    system: System | None,
    unseal: Unseal,
    tools: Mapping[str, Tool],
    read_pdf: ReadPdf = pdf_text,
) -> tuple[Message, ...]:
    """The conversation. Raises InvalidRequest for blocks and fields that their role cannot have.

    System text and the system turns at the beginning are one message; so are turns of one side that follow each other,
    as Anthropic reads them. Results come before the text that is sent with them, in the order of the turn.
    `tools` are all that the turns refer to.
    """
    writer = _Writer(unseal, texts=Texts(tools, read_pdf=read_pdf))
    if system:
        writer.system(system)
    last_user = max((position for position, turn in enumerate(turns) if turn.role == "user"), default=-1)
    for position, turn in enumerate(turns):
        _check(turn, path=f"messages.{position}")
        blocks: Sequence[Block] = _shown(turn, is_over=position < last_user)
        if blocks or turn.role != "system":
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


def _check(turn: WireMessage, *, path: str) -> None:
    """Refuse what only turns of the system have."""
    fields = ("output_config", "clear_at")
    wrong = next((name for name in fields if getattr(turn, name) is not None), None)
    if wrong is not None and turn.role != "system":
        raise InvalidRequest(f"{path}.{wrong}: only turns of the system have it.", param=f"{path}.{wrong}")
    if turn.content is None and (turn.output_config is None or turn.output_config.effort is None):
        raise InvalidRequest(f"{path}.content is missing.", param=f"{path}.content")


def _shown(turn: WireMessage, *, is_over: bool) -> Sequence[Block]:
    """The blocks of a turn, without the text that was only for a turn of the user that is over."""
    if isinstance(turn.content, str):
        blocks: Sequence[Block] = [TextBlock(type="text", text=turn.content)]
    else:
        blocks = turn.content or ()
    if turn.clear_at != "next_user_message" or not is_over:
        return blocks
    return [block for block in blocks if not isinstance(block, TextBlock)]


class _Writer:
    """Puts messages together, turn by turn."""

    def __init__(self, unseal: Unseal, *, texts: Texts) -> None:
        self._unseal = unseal
        self._texts = texts
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
        for where, block in self._texts.spoken(role, blocks, path=path):
            self._block(role, block, path=where)
            has_part = has_part or not isinstance(block, RedactedThinkingBlock)
        if not has_part and role == "user":
            self._text(role, "", None)

    def _block(self, role: str, block: Block, *, path: str) -> None:
        match block:
            case TextBlock():
                self._text(role, block.text, block.cache_control)
            case DocumentBlock() | SearchResultBlock() if role == "user":
                self._text(role, self._texts.plain(block, path=path), block.cache_control)
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
        texts = [content] if isinstance(content, str) else list(self._texts.result(content, path=f"{path}.content"))
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


def has_files(turns: Iterable[WireMessage]) -> bool:
    """Whether reading the turns takes so long that it needs a thread."""
    blocks = [block for _, block in placed_blocks(turns)]
    parts = [*blocks, *(part for block in blocks for part in result_parts(block))]
    return any(isinstance(part, DocumentBlock) and isinstance(part.source, PdfSource) for part in parts)
