"""Calls written as JSON objects: `{"name": ..., "arguments": {...}}`, alone, in a list, or one after another."""

from __future__ import annotations

import json

import msgspec

from vllm_mlx.chat.payloads.actions import SETTLED, Arguments, CallOpen, NotACall, Parsing
from vllm_mlx.chat.payloads.json_text import JsonScanner, mended, read_json, read_json_string
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet

_NAMES = ("name", "tool_name", "function_name")
_ARGUMENTS = ("arguments", "parameters", "args", "params", "input")
_IDS = ("id", "tool_call_id")
_INNER = "function"
KEYS = (*_NAMES, *_ARGUMENTS, *_IDS, _INNER, "type")
"""What a call may begin with where nothing marks it."""


class ObjectRules(msgspec.Struct, frozen=True):
    """How strictly objects are read."""

    needs_arguments: bool = False
    """Whether an object without arguments is no call; otherwise it is one without any."""
    needs_known_name: bool = False
    """Whether the tool must be one of the request's: for text that is not marked as a call."""


class _Found(msgspec.Struct):
    """What is known of the call that is being read."""

    name: str | None = None
    id: str | None = None
    held: str | None = None
    """Arguments that came before the name."""
    is_open: bool = False


def read_objects(reader: Reader, tools: ToolSet, rules: ObjectRules) -> Parsing[None]:
    """One object or a list of them. Raises NotACall."""
    if not (yield from reader.accept("[")):
        yield from read_object(reader, tools, rules)
        return
    yield from reader.space()
    while True:
        yield from read_object(reader, tools, rules)
        yield from reader.space()
        if (yield from reader.expect(",", "]")) == "]":
            return
        yield from reader.space()


def read_object(reader: Reader, tools: ToolSet, rules: ObjectRules) -> Parsing[None]:
    """One call. Raises NotACall."""
    found = _Found()
    yield from _members(reader, tools, rules, found)
    if found.is_open:
        return
    if found.name is None or (found.held is None and rules.needs_arguments):
        raise NotACall("an object without name or arguments")
    yield CallOpen(found.name, found.id)
    yield Arguments(found.held or "{}")


def stream_arguments(reader: Reader, opening: CallOpen) -> Parsing[None]:
    """Arguments, sent as they are written; the call is opened when they begin like an object, or where the text ends
    before that shows. Raises NotACall.
    """
    first = yield from reader.peek()
    if first != "{":
        text = _object_text((yield from read_json(reader)))
        yield opening
        yield Arguments(text)
        return
    scanner = JsonScanner()
    is_open = False
    while True:
        text, at = reader.window()
        reader.take_to(scanner.read(text, at))
        if reader.is_over:
            scanner.end()
        if (scanner.is_sure or scanner.is_cut_off) and not is_open:
            is_open = True
            yield opening
        if is_open and (piece := scanner.take_output()):
            yield Arguments(piece)
        if scanner.error:
            raise scanner.error
        if scanner.is_done:
            return
        yield None


def _members(reader: Reader, tools: ToolSet, rules: ObjectRules, found: _Found) -> Parsing[None]:
    yield from reader.expect("{")
    yield from reader.space()
    if (yield from reader.accept("}")):
        return
    is_first = True
    while True:
        key = yield from read_json_string(reader)
        if rules.needs_known_name and is_first and key not in KEYS:
            raise NotACall("an object of something else")
        is_first = False
        yield from reader.space()
        yield from reader.expect(":")
        yield from reader.space()
        yield from _member(reader, tools, rules, found, key=key)
        yield from reader.space()
        if (yield from reader.expect(",", "}")) == "}":
            return
        yield from reader.space()


def _member(reader: Reader, tools: ToolSet, rules: ObjectRules, found: _Found, *, key: str) -> Parsing[None]:
    if key == _INNER and (yield from reader.peek()) == "{":
        yield from _members(reader, tools, rules, found)
    elif key in (*_NAMES, _INNER) and found.name is None:
        found.name = yield from read_json_string(reader)
        if not found.name or (rules.needs_known_name and not tools.knows(found.name)):
            raise NotACall(f"no tool is called {found.name!r}")
    elif key in _ARGUMENTS and not found.is_open:
        if found.name is None:
            found.held = _object_text((yield from read_json(reader)))
            return
        yield from stream_arguments(reader, CallOpen(found.name, found.id))
        found.is_open = True
    else:
        value = json.loads((yield from read_json(reader)))
        if key in _IDS and isinstance(value, str) and value:
            found.id = value


def _object_text(text: str) -> str:
    """Arguments that are an object, an object inside a string, or null. Raises NotACall for others."""
    value = json.loads(text)
    if isinstance(value, str):
        text = mended(value or "{}")
        value = json.loads(text)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise NotACall("arguments that are no object")
    return text


def read_marked_objects(
    reader: Reader, tools: ToolSet, rules: ObjectRules, *, ends: tuple[str, ...] = ()
) -> Parsing[None]:
    """Objects behind an opening mark, one after another or between `;` or `,`, up to and with one of some ends."""
    yield from reader.space()
    yield from read_objects(reader, tools, rules)
    while True:
        yield SETTLED
        yield from reader.space()
        if ends and (yield from reader.accept(*ends)):
            return
        if (yield from reader.accept(";", ",")):
            yield from reader.space()
        if (yield from reader.peek()) not in ("{", "["):
            return
        yield from read_objects(reader, tools, rules)
