"""What stands behind `<tool_call>` and in Qwen's other ways to write a call."""

from __future__ import annotations

import re

from vllm_mlx.chat.payloads.actions import CallOpen, NotACall, Parsing
from vllm_mlx.chat.payloads.elements import Elements, Pairs, read_element, read_pairs
from vllm_mlx.chat.payloads.objects import ObjectRules, read_marked_objects, stream_arguments
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet

TAGGED = "<tool_call>"
TAGGED_END = "</tool_call>"
FUNCTION = "<function="
BRACKET = "[Calling tool:"
BRACKET_END = ")]"
_NAME = re.compile(r"[\w.:-]+")
_ELEMENTS = Elements(guess=True, is_framed=True)
TYPED_BY_SCHEMA = Elements(is_framed=True)
"""Values without a schema are text."""
_PAIRS = Pairs(needs_known_name=True)


def read_tagged(
    reader: Reader, opener: str, tools: ToolSet, *, pairs: Pairs = _PAIRS, elements: Elements = _ELEMENTS
) -> Parsing[None]:
    """A call in the form that its first characters show, up to its end. Raises NotACall."""
    if opener == FUNCTION:
        reader.give_back("=")
        yield from read_element(reader, tools, elements)
        yield from reader.space()
        yield from reader.accept(TAGGED_END)
        return
    yield from reader.space()
    first = yield from reader.peek()
    if first in ("{", "["):
        yield from read_marked_objects(reader, tools, ObjectRules(), ends=(TAGGED_END,))
    elif first == "<":
        yield from _elements(reader, tools, elements)
    else:
        yield from read_pairs(reader, tools, pairs)


def _elements(reader: Reader, tools: ToolSet, elements: Elements) -> Parsing[None]:
    yield from reader.expect("<function")
    while True:
        yield from read_element(reader, tools, elements)
        yield from reader.space()
        if (yield from reader.accept(TAGGED_END, "<function")) != "<function":
            return


def read_bracket(reader: Reader, *, end: str) -> Parsing[None]:
    """`f({...})]`, from behind what opens it. Raises NotACall."""
    yield from reader.space()
    name = yield from reader.run(_NAME)
    yield from reader.expect("(")
    yield from reader.space()
    if not name:
        raise NotACall("a call without a name")
    yield from stream_arguments(reader, CallOpen(name))
    yield from reader.space()
    yield from reader.accept(end)
