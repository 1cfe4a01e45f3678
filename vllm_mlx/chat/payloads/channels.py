"""Harmony: messages with a header that names a channel and perhaps a recipient (OpenAI's format of gpt-oss).

    <|start|>assistant<|channel|>analysis<|message|>...<|end|>
    <|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|>...<|return|>

The recipient may stand before or after the channel.
"""

from __future__ import annotations

import re

from vllm_mlx.chat.payloads.actions import CallOpen, NotACall, Parsing, Shown, Thought
from vllm_mlx.chat.payloads.markers import Markers
from vllm_mlx.chat.payloads.objects import stream_arguments
from vllm_mlx.chat.payloads.plain import read_plain_call
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.plain_tools import FREEFORM_ARGUMENT

OPENERS = ("<|channel|>", "<|start|>")
ENDS = ("<|end|>", "<|return|>", "<|call|>")
RECIPIENT_FIRST = " to="
"""How a message begins whose `<|start|>assistant` stands in the prompt."""
_MESSAGE = "<|message|>"
_AFTER_RECIPIENT = ("<|channel|>", "<|constrain|>", _MESSAGE)
_CODE_TOOL = "python"
_NAME = re.compile(r"[\w.:/-]+")
_BOUNDS = (*ENDS, *OPENERS)
_BODY_ENDS = Markers(_BOUNDS)
_RECIPIENT = re.compile(r"to=([\w.:/-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def read_message(reader: Reader, opener: str, *, tools: ToolSet | None) -> Parsing[None]:
    """One message, from behind its first mark; None: it calls no tool. Raises NotACall if it has no body."""
    header = opener
    if opener == RECIPIENT_FIRST:
        header += yield from reader.run(_NAME)
        yield from reader.space()
        header += yield from reader.expect(*_AFTER_RECIPIENT)
    if not header.endswith(_MESSAGE):
        rest, end = yield from reader.until(_MESSAGE, *ENDS)
        header += rest
        if end != _MESSAGE:
            raise NotACall("a message without a body")
    channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
    if recipient and tools is not None:
        yield from _call(reader, recipient[1].removeprefix("functions."), tools)
    else:
        yield from _body(reader, is_thought=channel is not None and channel[1] == "analysis")


def _call(reader: Reader, name: str, tools: ToolSet) -> Parsing[None]:
    plain = "code" if name == _CODE_TOOL else FREEFORM_ARGUMENT if name in tools.plain else None
    if plain is None:
        yield from reader.space()
        if (yield from reader.peek()) != "{":
            raise NotACall("arguments that are no JSON")
        yield from stream_arguments(reader, CallOpen(name))
        yield from reader.space()
        yield from reader.accept(*ENDS)
    else:
        yield from read_plain_call(reader, CallOpen(name), plain, ends=_BODY_ENDS, next_marks=OPENERS)


def _body(reader: Reader, *, is_thought: bool) -> Parsing[None]:
    kind = Thought if is_thought else Shown
    while True:
        piece, end = reader.advance(_BODY_ENDS)
        if piece:
            yield kind(piece)
        if end in OPENERS:
            reader.give_back(end)
        if end or reader.is_over:
            return
        yield None
