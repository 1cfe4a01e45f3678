"""Kimi K2: calls named `functions.NAME:INDEX`, which is also their id."""

from __future__ import annotations

import re

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import CallOpen, Parsing
from vllm_mlx.chat.payloads.objects import stream_arguments
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet

_SECTIONS = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
_SECTION_ENDS = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
_CALL = "<|tool_call_begin|>"
_CALL_END = "<|tool_call_end|>"
_ARGUMENTS = "<|tool_call_argument_begin|>"
_ID = re.compile(r"(?:functions\.)?(?P<name>.+):\d+")


def parse(reader: Reader, opener: str, _tools: ToolSet) -> Parsing[None]:
    """One call or a section of them."""
    if opener in _SECTIONS:
        yield from reader.space()
        yield from reader.expect(_CALL)
    while True:
        yield from _call(reader)
        yield from reader.space()
        if (yield from reader.accept(_CALL, *_SECTION_ENDS)) != _CALL:
            return


def _call(reader: Reader) -> Parsing[None]:
    """A call whose id has no index names no tool and is passed over, as the model's own parsers do."""
    head, _ = yield from reader.until(_ARGUMENTS)
    call_id = head.strip()
    named = _ID.fullmatch(call_id)
    if not named:
        yield from reader.until(_CALL_END)
        return
    yield from reader.space()
    yield from stream_arguments(reader, CallOpen(named["name"], call_id))
    yield from reader.space()
    yield from reader.accept(_CALL_END)


_SYNTAX = CallSyntax(
    mark=_SECTIONS[0],
    opening=_CALL,
    head=f"functions.{{name}}:{{index}}{_ARGUMENTS}",
    end=_CALL_END,
    between=_CALL,
    closing=_SECTION_ENDS[0],
)

FORMATS = (
    ToolFormat(
        name="kimi",
        aliases=("kimi_k2", "moonshot", "kimik2", "kimi_k3"),
        openers=(*_SECTIONS, _CALL),
        parse=parse,
        calls=(_SYNTAX,),
        signatures=("<|tool_call_argument_begin|>",),
        model_types=("kimi_k2", "kimi_k25"),
    ),
)
