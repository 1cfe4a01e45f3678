"""Mistral: `[TOOL_CALLS]` with a list of objects, or with `name{...}` or `name[ARGS]{...}`, repeated."""

from __future__ import annotations

import re

from vllm_mlx.chat.call_syntax import CallSyntax
from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import CallOpen, NotACall, Parsing
from vllm_mlx.chat.payloads.objects import ObjectRules, read_marked_objects, stream_arguments
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet

_OPENER = "[TOOL_CALLS]"
_NAME = re.compile(r"[A-Za-z0-9_.:/-]+")


def parse(reader: Reader, _opener: str, tools: ToolSet) -> Parsing[None]:
    """The form that the first characters show."""
    yield from reader.space()
    if (yield from reader.peek()) in ("[", "{"):
        yield from read_marked_objects(reader, tools, ObjectRules())
        return
    name = yield from reader.run(_NAME)
    if not name:
        raise NotACall("a call without a name")
    call_id = None
    if (yield from reader.accept("[CALL_ID]")):
        call_id, _ = yield from reader.until("[ARGS]")
    else:
        yield from reader.accept("[ARGS]")
    yield from reader.space()
    if (yield from reader.peek()) != "{":
        raise NotACall("a call without arguments")
    yield from stream_arguments(reader, CallOpen(name, call_id))


FORMATS = (
    ToolFormat(
        name="mistral",
        aliases=("devstral", "ministral", "magistral"),
        openers=(_OPENER,),
        parse=parse,
        calls=(
            CallSyntax(mark=_OPENER, head="{name}[ARGS]", end="", between=_OPENER, template="[ARGS]"),
            CallSyntax(mark=_OPENER, opening="[", between=", ", closing="]"),
        ),
        signatures=(_OPENER,),
        model_types=("mistral", "mixtral", "mistral3", "ministral3"),
        has_short_ids=True,
    ),
)
