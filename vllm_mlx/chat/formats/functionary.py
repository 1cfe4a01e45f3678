"""Functionary: messages with a recipient, or `<function=f>{...}</function>`, or a list of objects."""

from __future__ import annotations

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import CallOpen, NotACall, Parsing, Shown
from vllm_mlx.chat.payloads.markers import Markers
from vllm_mlx.chat.payloads.objects import ObjectRules, read_marked_objects, stream_arguments
from vllm_mlx.chat.payloads.plain import read_plain_call
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tagged import FUNCTION, read_tagged
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.plain_tools import FREEFORM_ARGUMENT

_FROM = "<|from|>"
_RECIPIENT = "<|recipient|>"
_CONTENT = "<|content|>"
_STOP = "<|stop|>"
_BODY_ENDS = Markers((_FROM, _STOP))
_LIST = ObjectRules(needs_arguments=True, needs_known_name=True)


def parse(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
    """One message or call."""
    if opener == FUNCTION:
        yield from read_tagged(reader, opener, tools)
    elif opener == "[":
        reader.give_back(opener)
        yield from read_marked_objects(reader, tools, _LIST)
    else:
        yield from _message(reader, opener, tools)


def _message(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
    if opener == _FROM:
        yield from reader.until(_RECIPIENT)
    recipient, _ = yield from reader.until(_CONTENT)
    yield from reader.space()
    name = recipient.strip()
    if name not in ("all", "user"):
        if not name:
            raise NotACall("a message to nobody")
        if name in tools.plain:
            yield from read_plain_call(reader, CallOpen(name), FREEFORM_ARGUMENT, ends=_BODY_ENDS, next_marks=(_FROM,))
        else:
            yield from stream_arguments(reader, CallOpen(name))
        return
    while True:
        piece, end = reader.advance(_BODY_ENDS)
        if piece:
            yield Shown(piece)
        if end == _FROM:
            reader.give_back(end)
        if end or reader.is_over:
            return
        yield None


_SYNTAX = CallSyntax(
    before=f"{_FROM}assistant\n",
    mark=_RECIPIENT,
    head=f"{{name}}\n{_CONTENT}",
    end="",
    between=f"{_FROM}assistant\n{_RECIPIENT}",
    raw=(f"{{name}}\n{_CONTENT}", ""),
    no_calls=(f"all\n{_CONTENT}", f"user\n{_CONTENT}"),
)

FORMATS = (
    ToolFormat(
        name="functionary",
        aliases=("meetkai",),
        openers=(_FROM, _RECIPIENT, FUNCTION, "["),
        parse=parse,
        calls=(_SYNTAX,),
        dropped=(_STOP,),
        is_marked=False,
        signatures=("<|recipient|>",),
    ),
)
