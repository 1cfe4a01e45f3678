"""Calls written as elements with one parameter each; values are text, and take the types of the tool's schema."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from vllm_mlx.chat.payloads.actions import Arguments, CallOpen, NotACall, Parsing
from vllm_mlx.chat.payloads.objects import stream_arguments
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet, allows_text, typed

NAME = re.compile(r"[^\s<>{}\[\]()\"'=,;|]+")
_ATTRIBUTE = re.compile(r"""\s*([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")


class Elements(msgspec.Struct, frozen=True):
    """The tags of one way to write a call: `<function=f>` and `<parameter=k>v</parameter>`, by default."""

    call: str = "<function"
    """How the call's tag begins; `=name>` or ` name="name">` follows."""
    call_end: str = "</function>"
    parameter: str = "<parameter"
    parameter_end: str = "</parameter>"
    may_be_cut: bool = False
    """Whether a call whose end is missing counts when all its parameters are closed."""
    guess: bool = False
    """Whether values without a schema are read as JSON where they are."""
    is_framed: bool = False
    """Whether a line break on either side of a value is never part of it."""


def read_element(reader: Reader, tools: ToolSet, elements: Elements) -> Parsing[None]:
    """One call, from behind the beginning of its tag. Raises NotACall."""
    attributes = yield from _tag(reader)
    name = attributes.get("name", "")
    if not name:
        raise NotACall("a call without a name")
    yield from reader.space()
    if (yield from reader.peek()) == "{":
        yield from stream_arguments(reader, CallOpen(name))
        yield from reader.space()
        yield from reader.accept(elements.call_end)
        return
    arguments = yield from _parameters(reader, tools, elements, name=name)
    yield CallOpen(name)
    yield Arguments(json.dumps(arguments, ensure_ascii=False))


def _parameters(reader: Reader, tools: ToolSet, elements: Elements, *, name: str) -> Parsing[dict[str, Any]]:
    arguments: dict[str, Any] = {}
    while True:
        yield from reader.space()
        if not (yield from reader.accept(elements.parameter)):
            if (yield from reader.accept(elements.call_end)) or (elements.may_be_cut and reader.is_over):
                return _unwrapped(arguments, tools, name)
            raise NotACall(f"expected {elements.call_end}")
        attributes = yield from _tag(reader)
        key = attributes.get("name")
        if key is None:
            raise NotACall("a parameter without a name")
        text = yield from _value(reader, elements)
        arguments.setdefault(key, _typed(text, attributes, tools.argument_schema(name, key), elements))


def _value(reader: Reader, elements: Elements) -> Parsing[str]:
    """Up to the closing tag; a parameter that is not closed ends where the next or the call's end begins."""
    ends = (elements.parameter_end, f"\n{elements.parameter}=", f"\n{elements.call_end}")
    text, end = yield from reader.until(*ends)
    if end != elements.parameter_end:
        reader.give_back(end)
    return text.removeprefix("\n").removesuffix("\n") if elements.is_framed else _unframed(text)


def _typed(text: str, attributes: dict[str, str], schema: Any, elements: Elements) -> Any:
    said = attributes.get("string")
    if said is None:
        return typed(text, schema, guess=elements.guess)
    if said == "true" and allows_text(schema):
        return text
    return typed(text, schema, guess=True)


def _unframed(text: str) -> str:
    """Without the one line break on each side of a value that begins on a line of its own."""
    return text[1:].removesuffix("\n") if text.startswith("\n") else text


def _unwrapped(arguments: dict[str, Any], tools: ToolSet, name: str) -> dict[str, Any]:
    """A single parameter called `arguments`, unless the tool has one, is the arguments themselves."""
    inner = arguments.get("arguments")
    if len(arguments) != 1 or inner is None or tools.argument_schema(name, "arguments") is not None:
        return arguments
    if isinstance(inner, str):
        inner = typed(inner, {"type": "object"})
    return inner if isinstance(inner, dict) else arguments


def _tag(reader: Reader) -> Parsing[dict[str, str]]:
    """The rest of a tag up to its `>`: `=name` or attributes."""
    text, end = yield from reader.until(">", "\n")
    if end == "\n":
        raise NotACall("a tag that is not closed")
    if text.startswith("="):
        return {"name": text[1:].strip().strip("\"'")}
    return {match[1]: match[2] if match[2] is not None else match[3] for match in _ATTRIBUTE.finditer(text)}


class Pairs(msgspec.Struct, frozen=True):
    """The tags of calls that are a name followed by keys and values, one after another."""

    key: str = "<arg_key>"
    key_end: str = "</arg_key>"
    value: str = "<arg_value>"
    value_end: str = "</arg_value>"
    end: str = "</tool_call>"
    separator: str = ""
    """What may stand between the name and the first key."""
    kind: str = ""
    kind_end: str = ""
    """The tags of a type that may stand between a key and its value."""
    guess: bool = True
    needs_known_name: bool = False
    """Whether a name without arguments must be one of the request's tools: what is no name looks the same."""
    keeps_space: bool = False
    """Whether line breaks around a value belong to it."""


def read_pairs(reader: Reader, tools: ToolSet, pairs: Pairs) -> Parsing[None]:
    """One call, from behind its opening tag up to and with its end. Raises NotACall."""
    yield from reader.space()
    name = yield from reader.run(NAME)
    if not name:
        raise NotACall("a call without a name")
    yield from reader.space()
    if pairs.separator:
        yield from reader.accept(pairs.separator)
    arguments: dict[str, Any] = {}
    while True:
        yield from reader.space()
        if (yield from reader.expect(pairs.key, pairs.end)) == pairs.end:
            break
        key, _ = yield from reader.until(pairs.key_end)
        text = yield from _pair_value(reader, pairs)
        value = typed(text, tools.argument_schema(name, key.strip()), guess=pairs.guess)
        arguments.setdefault(key.strip(), value)
    if pairs.needs_known_name and not arguments and not (tools.schemas and tools.knows(name)):
        raise NotACall(f"no tool is called {name!r}")
    yield CallOpen(name)
    yield Arguments(json.dumps(arguments, ensure_ascii=False))


def _pair_value(reader: Reader, pairs: Pairs) -> Parsing[str]:
    yield from reader.space()
    if pairs.kind and (yield from reader.accept(pairs.kind)):
        yield from reader.until(pairs.kind_end)
        yield from reader.space()
    yield from reader.expect(pairs.value)
    text, _ = yield from reader.until(pairs.value_end)
    return text if pairs.keeps_space else _unframed(text)
