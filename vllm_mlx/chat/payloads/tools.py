"""The tools of a request, as far as parsers need them: names, and the types of arguments that are written untyped."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

import msgspec

_STRING_TYPES = ("string", "str", "text", "varchar", "char", "enum")
_INTEGER_TYPES = ("integer", "int", "long", "short", "unsigned")
_NUMBER_TYPES = ("number", "float", "double", "num", "decimal")
_MAX_LITERAL = 200_000


class ToolSet(msgspec.Struct, frozen=True):
    """Tools by name, with the JSON schema of their arguments. An empty set knows no tool and believes every name."""

    schemas: Mapping[str, Mapping[str, Any]] = {}
    plain: frozenset[str] = frozenset()
    """Those that take one text, written as it is where the format has a place for that."""

    def knows(self, name: str) -> bool:
        """Whether a call of that name may be meant."""
        return not self.schemas or name in self.schemas

    def argument_schema(self, tool: str, argument: str) -> Mapping[str, Any] | None:
        """What is said of an argument, if anything."""
        schema = self.schemas.get(tool, {})
        properties = schema.get("properties")
        found = properties.get(argument) if isinstance(properties, Mapping) else None
        return resolved(found, schema) if isinstance(found, Mapping) else None


def typed(text: str, schema: Mapping[str, Any] | None, *, guess: bool = False) -> Any:
    """The value that an untyped text stands for under a schema; the text itself where it does not fit.

    Without a schema it is text, or, if the format writes strings as they are and everything else as JSON (`guess`),
    JSON or a Python literal where it is one.
    """
    types = _types(schema)
    if not types:
        return _guessed(text) if guess else text
    if "null" in types and text.strip() in ("null", "None"):
        return None
    if any(kind in _STRING_TYPES for kind in types) and len(types - {"null"}) == 1:
        return text
    for kind in sorted(types - {"null"}, key=lambda kind: kind in _STRING_TYPES):
        value = _as_type(text, kind)
        if value is not _MISFIT:
            return value
    return text


_MISFIT = object()


def _as_type(text: str, kind: str) -> Any:
    stripped = text.strip()
    if kind in _STRING_TYPES:
        return text
    if kind in ("boolean", "bool"):
        return {"true": True, "false": False, "1": True, "0": False}.get(stripped.lower(), _MISFIT)
    if kind.startswith(_INTEGER_TYPES) or kind.startswith(_NUMBER_TYPES):
        return _as_number(stripped, is_integer=kind.startswith(_INTEGER_TYPES))
    value = _literal(stripped)
    if isinstance(value, str) and kind in ("object", "array", "dict", "list"):
        value = _literal(value)
    fits = {"array": list, "list": list, "object": dict, "dict": dict}.get(kind, object)
    return value if isinstance(value, fits) else _MISFIT


def _as_number(text: str, *, is_integer: bool) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = _MISFIT
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _MISFIT
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return _MISFIT if is_integer and isinstance(value, float) else value


def allows_text(schema: Mapping[str, Any] | None) -> bool:
    """Whether a schema lets an argument be a string; without one it may be."""
    types = _types(schema)
    return not types or any(kind in _STRING_TYPES for kind in types)


def _guessed(text: str) -> Any:
    value = _literal(text.strip())
    return text if value is _MISFIT else value


def _literal(text: str) -> Any:
    """JSON, or a Python literal as models trained on Python write it."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        pass
    if len(text) > _MAX_LITERAL:
        return _MISFIT
    try:
        return plain(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _MISFIT


def plain(value: Any) -> Any:
    """A Python literal with JSON's types only: tuples become lists. Raises TypeError for what JSON has not."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else json.dumps(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} is not a type of JSON")


def _types(schema: Mapping[str, Any] | None) -> set[str]:
    """All types that a schema allows, as far as it says so."""
    if schema is None:
        return set()
    said = schema.get("type")
    found = {said} if isinstance(said, str) else set(said) if isinstance(said, list) else set()
    for word in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(word)
        for branch in branches if isinstance(branches, list) else ():
            found |= _types(branch) if isinstance(branch, Mapping) else set()
    if not found and isinstance(schema.get("enum"), list):
        found = {_type_of(value) for value in schema["enum"]}
    if not found:
        found = {"object"} if "properties" in schema else {"array"} if "items" in schema else set()
    return {kind.lower() for kind in found if isinstance(kind, str)}


def _type_of(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow one local reference (`#/$defs/x`)."""
    target = schema.get("$ref")
    if not isinstance(target, str) or not target.startswith("#/"):
        return schema
    found: Any = root
    for step in target[2:].split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else schema
