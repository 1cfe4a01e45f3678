"""Sections of `<invoke name="f"><parameter name="k">v</parameter></invoke>`, under whatever names."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vllm_mlx.chat.payloads.actions import Parsing
from vllm_mlx.chat.payloads.elements import Elements, read_element
from vllm_mlx.chat.payloads.objects import ObjectRules, read_objects
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet


class Invokes(msgspec.Struct, frozen=True, kw_only=True):
    """The tags of one model."""

    wrappers: tuple[str, ...]
    wrapper_ends: tuple[str, ...]
    call: str = "<invoke"
    call_end: str = "</invoke>"
    parameter: str = "<parameter"
    parameter_end: str = "</parameter>"
    before: tuple[str, ...] = ()
    """What may stand before a call inside the section."""
    after: tuple[str, ...] = ()
    """What may stand behind one."""
    guess: bool = False
    """Whether values without a schema are read as JSON where they are."""


def invokes_parser(rules: Invokes) -> Callable[[Reader, str, ToolSet], Parsing[None]]:
    """A parser of sections and of calls that stand alone. A section may also hold JSON objects."""
    elements = Elements(rules.call, rules.call_end, rules.parameter, rules.parameter_end, guess=rules.guess)

    def parse(reader: Reader, opener: str, tools: ToolSet) -> Parsing[None]:
        if opener.startswith(rules.call):
            reader.give_back(opener.removeprefix(rules.call))
            yield from read_element(reader, tools, elements)
            return
        yield from _skip(reader, rules.before)
        if (yield from reader.peek()) in ("{", "["):
            yield from read_objects(reader, tools, ObjectRules())
        else:
            yield from reader.expect(rules.call)
            yield from read_element(reader, tools, elements)
        while True:
            yield from _skip(reader, (*rules.after, *rules.before))
            if (yield from reader.accept(rules.call, *rules.wrapper_ends)) != rules.call:
                return
            yield from read_element(reader, tools, elements)

    return parse


def _skip(reader: Reader, literals: tuple[str, ...]) -> Parsing[None]:
    yield from reader.space()
    while literals and (yield from reader.accept(*literals)):
        yield from reader.space()
