"""Calls as Gemma writes them: `call:f{key:<|"|>text<|"|>,n:1,list:[...]}`, JSON with bare keys and its own quotes."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from vllm_mlx.chat.payloads.actions import Arguments, CallOpen, NotACall, Parsing
from vllm_mlx.chat.payloads.json_text import read_json_string
from vllm_mlx.chat.payloads.pythonic import read_python_call
from vllm_mlx.chat.payloads.reader import Reader

_NAME = re.compile(r"[\w.:/-]+")
_WORD = re.compile(r"[^,{}\[\]<\"]+")
_WORDS = {"true": True, "false": False, "null": None, "None": None, "True": True, "False": False}
_MAX_DEPTH = 100


class BareWords(msgspec.Struct, frozen=True):
    """The marks of one model."""

    quote: str = '<|"|>'
    end: str = "<tool_call|>"


def read_bare_calls(reader: Reader, marks: BareWords) -> Parsing[None]:
    """The calls of one block, up to and with its end. Raises NotACall."""
    yield from reader.space()
    while True:
        yield from reader.accept("call:", ":")
        name = yield from reader.run(_NAME)
        if name and (yield from reader.peek()) == "(":
            yield from read_python_call(reader, name)
        else:
            yield from _braced(reader, marks, name)
        yield from reader.space()
        if (yield from reader.accept(marks.end)) or (yield from reader.peek()) != "c":
            return


def _braced(reader: Reader, marks: BareWords, name: str) -> Parsing[None]:
    if not name or (yield from reader.peek()) != "{":
        raise NotACall("no call")
    arguments = yield from _value(reader, marks, depth=0)
    yield CallOpen(name)
    yield Arguments(json.dumps(arguments, ensure_ascii=False))


def _value(reader: Reader, marks: BareWords, *, depth: int) -> Parsing[Any]:
    if depth > _MAX_DEPTH:
        raise NotACall("values that are nested too deeply")
    yield from reader.space()
    if (yield from reader.peek()) == '"':
        return (yield from read_json_string(reader))
    opened = yield from reader.accept("{", "[", marks.quote)
    if opened == "{":
        return (yield from _members(reader, marks, depth=depth))
    if opened == "[":
        return (yield from _items(reader, marks, depth=depth))
    if opened:
        text, _ = yield from reader.until(opened)
        return text
    return _word((yield from reader.run(_WORD)))


def _members(reader: Reader, marks: BareWords, *, depth: int) -> Parsing[dict[str, Any]]:
    members: dict[str, Any] = {}
    yield from reader.space()
    while not (yield from reader.accept("}")):
        key = yield from _key(reader, marks)
        members[key] = yield from _value(reader, marks, depth=depth + 1)
        yield from _separator(reader, "}")
    return members


def _key(reader: Reader, marks: BareWords) -> Parsing[str]:
    """A name with the colon behind it."""
    if (yield from reader.peek()) == '"':
        key = yield from read_json_string(reader)
    elif (yield from reader.accept(marks.quote)):
        key, _ = yield from reader.until(marks.quote)
    else:
        key, _ = yield from reader.until(":")
        return key.strip()
    yield from reader.space()
    yield from reader.expect(":")
    return key


def _items(reader: Reader, marks: BareWords, *, depth: int) -> Parsing[list[Any]]:
    items: list[Any] = []
    yield from reader.space()
    while not (yield from reader.accept("]")):
        items.append((yield from _value(reader, marks, depth=depth + 1)))
        yield from _separator(reader, "]")
    return items


def _separator(reader: Reader, end: str) -> Parsing[None]:
    yield from reader.space()
    if not (yield from reader.accept(",")) and (yield from reader.peek()) != end:
        raise NotACall("a value that does not end")
    yield from reader.space()


def _word(text: str) -> Any:
    text = text.strip()
    if not text:
        raise NotACall("a value that is missing")
    if text in _WORDS:
        return _WORDS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text
