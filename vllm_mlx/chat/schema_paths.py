"""Where in a JSON schema the keyword stands that an error message speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_NAMED = re.compile(r"[$\w-]+")
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose keys are names of the caller's."""
VALUES = ("enum", "const", "default", "examples")
"""Keywords whose values are no schemas."""


def path_of(schema: Any, message: str) -> str | None:
    """Dotted path of the keyword that the message names by its name or by its value; None if it names none."""
    names = set(_NAMED.findall(message))
    by_value = None
    for path, key, value in _keywords(schema, ()):
        if key in names and key not in ("type", "properties", "items"):
            return ".".join(map(str, path))
        is_told = isinstance(value, str) and value.removeprefix("#") and value.removeprefix("#") in message
        if by_value is None and is_told and key in ("type", "format", "pattern", "$ref"):
            by_value = ".".join(map(str, path))
    return by_value


def _keywords(schema: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str, Any]]:
    """Keywords of a schema and of those in it: path, name, value."""
    if isinstance(schema, list):
        for i, one in enumerate(schema):
            yield from _keywords(one, (*path, i))
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        here = (*path, key)
        yield here, key, value
        if key in VALUES:
            continue
        if key in MAPS and isinstance(value, dict):
            for name, one in value.items():
                yield from _keywords(one, (*here, name))
        else:
            yield from _keywords(value, here)
