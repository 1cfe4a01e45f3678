"""Grammars of arguments that are written one by one under their names, texts as they are."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from vllm_mlx.chat.call_syntax import NamedArguments
from vllm_mlx.chat.lark import Literal, in_regex, up_to
from vllm_mlx.chat.payloads.tools import allows_text, resolved
from vllm_mlx.chat.shapes import schema_entry
from vllm_mlx.core.errors import InvalidRequest

FREE_TEXT = "free_text"
"""Rule of any text up to what stands behind it."""
_BEYOND = ("pattern", "format", "not", "if")
"""Keywords that a text without quotes is not held to."""
_BEYOND_ALL = ("anyOf", "oneOf", "allOf", "not", "if", "patternProperties", "minProperties", "maxProperties")
"""Keywords that arguments with names of their own are not held to as a whole."""
_LONGEST = 2000
"""A longer `maxLength` is no bound worth counting for."""
_SAYS_NOTHING = frozenset(("title", "description", "default", "examples", "$defs", "definitions"))
_NO_NAME = re.compile(r"[<>\"'{}:,\r\n\t]|^ | $|^$")
_OTHER_NAME = "[A-Za-z_][A-Za-z0-9_]{0,63}"
_DEFINITIONS = ("$defs", "definitions")
_MAX_NESTING = 8

Head = Callable[[bool], str]
"""What stands before a value, by whether it is a text, as a Lark expression."""


def free_text(named: NamedArguments, fixed: Literal) -> list[str]:
    """The rule of that name."""
    return [] if named.text is None else up_to(FREE_TEXT, fixed(named.text[1] + named.behind))


class ArgumentRules(msgspec.Struct, frozen=True, kw_only=True):
    """Writes the arguments of one tool as rules of a grammar."""

    schema: Mapping[str, Any]
    named: NamedArguments
    rule: str
    """What the names of its rules begin with."""
    fixed: Literal
    param: str
    """The field of the schema, for errors."""
    is_strict: bool

    def write(self) -> tuple[str, list[str]]:
        """The expression of all arguments, in the order of the schema, and the rules that it needs.

        Raises:
            InvalidRequest: a strict schema has a keyword that cannot be enforced; `param` names it.
        """
        found = _properties(self.schema)
        if self.named.keys_are_words and not all(key.isidentifier() and not keyword.iskeyword(key) for key in found):
            return self._json(self.schema), []
        if self.is_strict and (word := next((word for word in _BEYOND_ALL if word in self.schema), None)):
            raise self._refusal(word, "arguments are written one by one here")
        required = self.schema.get("required") or ()
        rules: list[str] = []
        written: list[tuple[str, bool]] = []
        for i, (key, own) in enumerate(found.items()):
            name, is_required = f"{self.rule}_{i}", key in required
            if not _NO_NAME.search(key):
                inside = msgspec.structs.replace(self, param=f"{self.param}.properties.{key}")
                rules += inside._argument(name, self._head(self.fixed(key)), own)
                written.append((name, is_required))
            elif self.is_strict or is_required:
                raise self._refusal(f"properties.{key}", "this model's calls have no place for such a name")
        other, more = self._others(found)
        expression, order = _in_order(written, other, self.fixed(self.named.separator), prefix=self.rule)
        return expression, [*rules, *more, *order]

    def _others(self, taken: Mapping[str, Any]) -> tuple[str, list[str]]:
        """The rule of an argument that no property describes, if the schema asks for such."""
        given = self.schema.get("additionalProperties")
        if given is None or given is False:
            return "", []
        name, key = f"{self.rule}_other", f"{self.rule.upper()}_KEY"
        but = f" & ~/{'|'.join(map(in_regex, taken))}/" if taken else ""
        return name, [f"{key}: /{_OTHER_NAME}/{but}", *self._argument(name, self._head(key), given)]

    def _head(self, key: str) -> Head:
        """`key` is a Lark expression."""

        def head(is_text: bool) -> str:
            before = self.named.before.replace("{is_text}", "true" if is_text else "false")
            return f" {key} ".join(self.fixed(part) for part in before.split("{key}"))

        return head

    def _argument(self, name: str, head: Head, given: Any) -> list[str]:
        """The rule of one argument, and those that it needs."""
        rules: list[str] = []
        either: dict[str, None] = {}
        for i, own in enumerate(_branches(given, self.schema)):
            for is_text, value, more in self._values(own, f"{name}_{i}"):
                either[f"{head(is_text)} {value}"] = None
                rules += more
        return [f"{name}: {' | '.join(either)}", *rules]

    def _values(self, own: Mapping[str, Any], name: str) -> Iterator[tuple[bool, str, list[str]]]:
        """(is a text, a value and what stands behind it, the rules that it needs) of each way to write one."""
        behind, choices = self.fixed(self.named.behind), _choices(own)
        if self.named.text is not None and choices:
            texts = [self._quoted(one) for one in choices if isinstance(one, str)]
            others = [self.fixed(self._word(one) + self.named.behind) for one in choices if not isinstance(one, str)]
            yield from (
                (is_text, f"({' | '.join(some)})", []) for is_text, some in ((True, texts), (False, others)) if some
            )
        elif self.named.text is not None and allows_text(own):
            yield True, *self._text(own, name)
        elif own.get("type") in ("boolean", "null") and not choices:
            words = self.named.words[:2] if own["type"] == "boolean" else self.named.words[2:]
            yield False, f"({' | '.join(map(self.fixed, words))}) {behind}", []
        elif self._is_list_of_texts(own):
            items, more = self._items(own, name)
            yield False, f"{items} {behind}", more
        else:
            yield False, f"{self._json(own)} {behind}", []

    def _text(self, own: Mapping[str, Any], name: str) -> tuple[str, list[str]]:
        """A text without quotes; what the parser reads as text is text."""
        assert self.named.text is not None
        before, behind = self.named.text
        bounds = _bounds(own)
        if self.is_strict and (word := _beyond(own, is_bounded=bounds is not None)):
            raise self._refusal(word, "this model writes values as plain text")
        if bounds is None:
            return f"{self.fixed(before)} {FREE_TEXT}", []
        return f"{self.fixed(before)} {name}", up_to(
            name, self.fixed(behind + self.named.behind), body=rf"(.|\n){{{bounds}}}"
        )

    def _is_list_of_texts(self, own: Mapping[str, Any]) -> bool:
        """Whether it is a list whose texts have quotes of the model's own, and is bounded in no other way."""
        items = own.get("items")
        if (
            not self.named.text
            or not all(self.named.text)
            or own.get("type") != "array"
            or not isinstance(items, Mapping)
        ):
            return False
        is_plain = not set(own) - _SAYS_NOTHING - {"type", "items", "minItems", "maxItems"}
        return is_plain and resolved(items, self.schema).get("type") == "string"

    def _items(self, own: Mapping[str, Any], name: str) -> tuple[str, list[str]]:
        assert self.named.text is not None
        inner = resolved(own["items"], self.schema)
        alone = msgspec.structs.replace(self, named=msgspec.structs.replace(self.named, behind=""))
        [(_, value, rules)] = alone._values(inner, f"{name}_item")
        least, most = own.get("minItems", 0), own.get("maxItems")
        more = f"{{{max(least - 1, 0)},{'' if most is None else max(most - 1, 0)}}}"
        filled = f'{value} ("," {value}){more}'
        if most == 0:
            return '"[" "]"', rules
        return f'"[" {filled} "]"' if least else f'"[" ({filled})? "]"', rules

    def _quoted(self, text: str) -> str:
        assert self.named.text is not None
        return self.fixed(text.join(self.named.text) + self.named.behind)

    def _word(self, value: Any) -> str:
        true, false, null = self.named.words
        return true if value is True else false if value is False else null if value is None else json.dumps(value)

    def _json(self, own: Mapping[str, Any]) -> str:
        whole = {**own, **{word: self.schema[word] for word in _DEFINITIONS if word in self.schema}}
        entry = schema_entry(whole, is_strict=self.is_strict, param=self.param, has_escapes=True)
        return f"%json {json.dumps(entry['json_schema'])}"

    def _refusal(self, path: str, why: str) -> InvalidRequest:
        param = f"{self.param}.{path}"
        return InvalidRequest(f"{param} cannot be enforced: {why}.", param=param)


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of each argument, those included that are only required."""
    given, required = schema.get("properties"), schema.get("required") or ()
    found = dict(given) if isinstance(given, Mapping) else {}
    return found | {key: {} for key in required if isinstance(key, str) and key not in found}


def _in_order(written: Sequence[tuple[str, bool]], other: str, separator: str, *, prefix: str) -> tuple[str, list[str]]:
    """The expression of arguments (rule, whether it is required) in their order, and the rules that it needs."""
    if not separator:
        return " ".join([*(name if must else f"{name}?" for name, must in written), f"{other}*" if other else ""]), []
    rest, first = f"({separator} {other})*" if other else '""', f"({other} ({separator} {other})*)?" if other else '""'
    rules = []
    for i, (name, must) in reversed(list(enumerate(written))):
        begun = f"{separator} {name} {prefix}_then{i}"
        rules.append(f"{prefix}_then{i}: {rest}")
        rules.append(f"{prefix}_first{i}: {name} {prefix}_then{i}" + ("" if must else f" | {first}"))
        rest, first = begun if must else f"({begun} | {rest})", f"{prefix}_first{i}"
    return first, rules


def _branches(given: Any, root: Mapping[str, Any], depth: int = 0) -> list[Mapping[str, Any]]:
    """The schemas one of which a value must match, references followed."""
    own = resolved(given, root) if isinstance(given, Mapping) else {}
    word = next((word for word in ("anyOf", "oneOf") if isinstance(own.get(word), list)), None)
    if word is None or set(own) - _SAYS_NOTHING - {word} or depth == _MAX_NESTING:
        return [own]
    return [branch for one in own[word] for branch in _branches(one, root, depth + 1)] or [own]


def _choices(own: Mapping[str, Any]) -> list[Any]:
    """The values that there are; empty: any."""
    found = [own["const"]] if "const" in own else own.get("enum")
    return found if isinstance(found, list) else []


def _bounds(own: Mapping[str, Any]) -> str | None:
    """Least and greatest length of a text, as in a regular expression; None if there is none to count."""
    least, most = own.get("minLength", 0), own.get("maxLength", "")
    is_counted = all(value in (0, "") or (type(value) is int and 0 < value <= _LONGEST) for value in (least, most))
    return f"{least},{most}" if is_counted and (least, most) != (0, "") else None


def _beyond(own: Mapping[str, Any], *, is_bounded: bool) -> str | None:
    """A keyword that a text is not held to."""
    words = _BEYOND if is_bounded else (*_BEYOND, "minLength", "maxLength")
    return next((word for word in words if own.get(word, 0) != 0), None)
