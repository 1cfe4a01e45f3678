"""Grammars of arguments that are written one by one, each in an element of its own, values as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from vllm_mlx.chat.payloads.tools import allows_text, resolved
from vllm_mlx.core.errors import InvalidRequest

FREE_VALUE = "free_value"
"""Rule of a text up to what stands behind a value."""
_BEYOND = ("pattern", "format", "not", "if")
"""Keywords that a text without quotes is not held to."""
_LONGEST = 2000
"""A longer `maxLength` is no bound worth counting for."""

Fixed = Callable[[str], str]
"""A fixed text as a Lark expression."""


def free_value(behind: str) -> str:
    """The rule of that name; `behind` is a Lark expression."""
    return _up_to(FREE_VALUE, "TEXT", behind)


def _up_to(name: str, text: str, behind: str) -> str:
    """The rule of a text and what ends it: a token of its own, or the first place where those characters stand."""
    return f"{name}: {text} {behind}" if behind.startswith("<[") else f"{name}[lazy]: {text} {behind}"


def element_rules(
    schema: Mapping[str, Any], around: tuple[str, str], *, prefix: str, fixed: Fixed, param: str, is_strict: bool
) -> tuple[str, list[str]]:
    """The expression of all arguments, in the order of the schema, and the rules that it needs.

    `around` has what stands before a value, with `{key}` for its name, and behind it.

    Raises:
        InvalidRequest: a strict schema has a keyword that cannot be enforced; `param` names the schema.
    """
    before, behind = around
    properties, required = schema.get("properties"), schema.get("required") or ()
    names, rules = [], []
    for i, (key, own) in enumerate(properties.items() if isinstance(properties, Mapping) else ()):
        name = f"{prefix}_{i}"
        own = resolved(own, schema) if isinstance(own, Mapping) else {}
        bounds = _bounds(own)
        if is_strict and bounds is None:
            _refuse_limits(own, f"{param}.properties.{key}")
        value = f"{name}_value" if bounds else _value(own, schema, fixed(behind), fixed)
        rules.append(f"{name}: {fixed(before.replace('{key}', key))} {value}")
        if bounds:
            rules.append(_up_to(value, rf"/(.|\n){{{bounds}}}/", fixed(behind)))
        names.append(name if key in required else f"{name}?")
    return " ".join(names), rules


def _value(own: Mapping[str, Any], root: Mapping[str, Any], behind: str, fixed: Fixed) -> str:
    """A value and what stands behind it. What the parser reads as text is text; all else is JSON."""
    if not allows_text(own):
        whole = {**own, **{word: root[word] for word in ("$defs", "definitions") if word in root}}
        return f"%json {json.dumps(whole)} {behind}"
    choices = _choices(own)
    return f"({' | '.join(map(fixed, choices))}) {behind}" if choices else FREE_VALUE


def _choices(own: Mapping[str, Any]) -> list[str]:
    """The texts that a value may be; empty: any."""
    found = [own["const"]] if "const" in own else own.get("enum")
    is_listed = isinstance(found, list) and all(isinstance(choice, str) and choice for choice in found)
    return list(found) if is_listed and found else []


def _bounds(own: Mapping[str, Any]) -> str | None:
    """Least and greatest length of a text, as in a regular expression; None if there is none to count."""
    least, most = own.get("minLength", 0), own.get("maxLength", "")
    is_counted = all(value in (0, "") or (type(value) is int and 0 < value <= _LONGEST) for value in (least, most))
    if not allows_text(own) or _choices(own) or (least, most) == (0, "") or not is_counted:
        return None
    return f"{least},{most}"


def _refuse_limits(own: Mapping[str, Any], param: str) -> None:
    """Raise InvalidRequest if a text has limits that are not enforced."""
    word = next((word for word in (*_BEYOND, "minLength", "maxLength") if word in own), None)
    if word is not None and allows_text(own) and not _choices(own):
        param = f"{param}.{word}"
        raise InvalidRequest(f"{param} cannot be enforced where this model writes values as plain text.", param=param)
