"""Harmony: messages with a header that names a channel and perhaps a recipient (OpenAI's format of gpt-oss).

    <|start|>assistant<|channel|>analysis<|message|>...<|end|>
    <|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|>...<|return|>

The recipient may stand before or after the channel.
"""

from __future__ import annotations

import json
import re

from vllm_mlx.chat.payloads.actions import Arguments, CallOpen, NotACall, Parsing, Shown, Thought
from vllm_mlx.chat.payloads.markers import Markers
from vllm_mlx.chat.payloads.objects import stream_arguments
from vllm_mlx.chat.payloads.reader import Reader

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


def read_message(reader: Reader, opener: str, *, has_tools: bool) -> Parsing[None]:
    """One message, from behind its first mark. Raises NotACall if it has no body."""
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
    if recipient and has_tools:
        yield from _call(reader, recipient[1].removeprefix("functions."))
    else:
        yield from _body(reader, is_thought=channel is not None and channel[1] == "analysis")


def _call(reader: Reader, name: str) -> Parsing[None]:
    yield from reader.space()
    if (yield from reader.peek()) == "{" and name != _CODE_TOOL:
        yield from stream_arguments(reader, CallOpen(name))
        yield from reader.space()
        yield from reader.accept(*ENDS)
        return
    if name != _CODE_TOOL:
        raise NotACall("arguments that are no JSON")
    code, end = yield from reader.until(*_BOUNDS)
    if end in OPENERS:
        reader.give_back(end)
    yield CallOpen(name)
    yield Arguments(json.dumps({"code": code}, ensure_ascii=False))


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
