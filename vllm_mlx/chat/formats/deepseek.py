"""DeepSeek V3, R1 (JSON in a fence) and V3.1 (JSON behind the name)."""

from __future__ import annotations

import msgspec

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import CallOpen, NotACall, Parsing
from vllm_mlx.chat.payloads.objects import stream_arguments
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet

_CALLS = "<｜tool▁calls▁begin｜>"
_CALLS_END = "<｜tool▁calls▁end｜>"
_CALL = "<｜tool▁call▁begin｜>"
_CALL_END = "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"


def parse(reader: Reader, opener: str, _tools: ToolSet) -> Parsing[None]:
    """One call or a section of them."""
    if opener == _CALLS:
        yield from reader.space()
        yield from reader.expect(_CALL)
    while True:
        yield from _call(reader)
        yield from reader.space()
        if (yield from reader.accept(_CALL, _CALLS_END)) != _CALL:
            return


def _call(reader: Reader) -> Parsing[None]:
    name = yield from _name(reader)
    if not name:
        raise NotACall("a call without a name")
    yield from reader.space()
    is_fenced = yield from reader.accept("```json", "```")
    yield from reader.space()
    yield from stream_arguments(reader, CallOpen(name))
    yield from reader.space()
    if is_fenced:
        yield from reader.accept("```")
        yield from reader.space()
    yield from reader.accept(_CALL_END)


def _name(reader: Reader) -> Parsing[str]:
    """V3 writes a type before the separator and the name behind it, V3.1 the name before."""
    first, end = yield from reader.until(_SEPARATOR, "\n", "{", _CALL_END)
    if end == "{":
        reader.give_back(end)
    if end != _SEPARATOR:
        return first.strip()
    yield from reader.space()
    if (yield from reader.peek()) == "{":
        return first.strip()
    name, end = yield from reader.until("\n", "```", "{", _CALL_END)
    if end in ("```", "{"):
        reader.give_back(end)
    return name.strip()


_V31 = CallSyntax(
    mark=_CALLS,
    opening=_CALL,
    head=f"{{name}}{_SEPARATOR}",
    end=_CALL_END,
    between=_CALL,
    closing=_CALLS_END,
)
_V3 = msgspec.structs.replace(
    _V31, head=f"function{_SEPARATOR}{{name}}\n```json\n", end=f"\n```{_CALL_END}", template="```json"
)

FORMATS = (
    ToolFormat(
        name="deepseek",
        aliases=("deepseek_v3", "deepseek_r1", "deepseek_v31", "deepseek_v3.1", "deepseek31"),
        openers=(_CALLS, _CALL),
        parse=parse,
        calls=(_V3, _V31),
        dropped=("<｜end▁of▁sentence｜>",),
        signatures=("<｜tool▁call▁begin｜>",),
        model_types=("deepseek_v3",),
    ),
)
