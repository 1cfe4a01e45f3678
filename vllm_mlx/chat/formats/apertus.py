"""Apertus: a list of objects with one member each, `{name: arguments}`."""

from __future__ import annotations

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import CallOpen, Parsing
from vllm_mlx.chat.payloads.json_text import read_json_string
from vllm_mlx.chat.payloads.objects import stream_arguments
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet

_OPENER = "<|tools_prefix|>"
_END = "<|tools_suffix|>"


def parse(reader: Reader, _opener: str, _tools: ToolSet) -> Parsing[None]:
    """The list up to its end."""
    yield from reader.space()
    yield from reader.expect("[")
    while True:
        yield from reader.space()
        yield from reader.expect("{")
        yield from reader.space()
        name = yield from read_json_string(reader)
        yield from reader.space()
        yield from reader.expect(":")
        yield from reader.space()
        yield from stream_arguments(reader, CallOpen(name))
        yield from reader.space()
        yield from reader.expect("}")
        yield from reader.space()
        if (yield from reader.expect(",", "]")) == "]":
            break
    yield from reader.space()
    yield from reader.accept(_END)


_SYNTAX = CallSyntax(mark=_OPENER, opening="[", head='{"{name}": ', between=", ", closing=f"]{_END}")

FORMATS = (
    ToolFormat(
        name="apertus",
        openers=(_OPENER,),
        parse=parse,
        calls=(_SYNTAX,),
        signatures=(_OPENER,),
        model_types=("apertus",),
    ),
)
