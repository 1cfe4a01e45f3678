"""Shapes of an answer as grammars, in llguidance's serialised form (one entry of its `grammars`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import llguidance

from vllm_mlx.chat.schema_dates import with_real_dates
from vllm_mlx.chat.schema_paths import path_of
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.shape import OutputShape

Entry = dict[str, Any]
"""`{"json_schema": ...}` or `{"lark_grammar": ...}`."""
Literal = Callable[[str], str]
"""A fixed text as a Lark expression: tokens of their own where it contains special ones."""

MAX_CHARS = 256 * 1024
"""Of a shape, as JSON. What llguidance makes of as much takes a second at most; see its own limits, too."""
MAX_REGEX_CHARS = 16 * 1024
MAX_DEPTH = 64
"""Of JSON; the parsers of both languages recurse."""
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between two tokens of JSON. Bounded, for small models may never stop writing it."""
ANY_TEXT = r"/(.|\n)*/"


def entry_of(shape: OutputShape, literal: Literal) -> Entry:
    """The grammar of a shape.

    Raises:
        InvalidRequest: it is malformed; `param` is the field. What llguidance alone can find wrong is found when the
            grammar is built.
    """
    match shape.kind:
        case "json_schema":
            return schema_entry(shape.value, is_strict=shape.is_strict, param=shape.param)
        case "json_object":
            return schema_entry({"type": "object"}, is_strict=True, param=shape.param)
        case "regex":
            return _regex(_text(shape))
        case "choice":
            return {"lark_grammar": "start: " + " | ".join(map(quoted, _choices(shape)))}
        case "grammar":
            return _grammar(_text(shape), shape.param)
        case "structural_tag":
            return _structural(shape, literal)


def schema_entry(schema: Any, *, is_strict: bool, param: str, has_escapes: bool = False) -> Entry:
    """The grammar of a JSON schema. Where it is not strict, what cannot be enforced is left to the model.

    `has_escapes`: characters may be written as `\\u00e9`, as models do that were trained on such calls; kept from it,
    they would write another escape. Texts with a pattern are written as they are.
    """
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"{param} must be a JSON schema: an object or a boolean.", param=param)
    if schema is False:
        raise InvalidRequest(f"{param}: nothing matches the schema false.", param=param)
    own = {} if schema is True else with_real_dates(schema)
    own.pop("x-guidance", None)  # options of the library are not the caller's
    options: dict[str, Any] = {"whitespace_pattern": WHITE_SPACE, "lenient": not is_strict}
    options |= {"coerce_one_of": not is_strict, "json_allow_general_unicode_escapes": has_escapes}
    return {"json_schema": {**own, "x-guidance": options}}


def refusal(shape: OutputShape, reason: str) -> InvalidRequest:
    """The error of a shape that llguidance cannot enforce, with the path of the keyword."""
    param = shape.param
    if shape.kind == "json_schema" and (path := path_of(shape.value, reason)):
        param = f"{param}.{path}"
    first = " ".join(reason.split())[:300]
    return InvalidRequest(f"{param} cannot be enforced: {first}", param=param, code="unsupported_value")


def quoted(text: str) -> str:
    """A fixed text as a Lark literal."""
    return json.dumps(text, ensure_ascii=False)


def check_size(shape: OutputShape) -> None:
    """Raise InvalidRequest if a shape is too large to look at."""
    if _depth(shape.value) > MAX_DEPTH:
        raise InvalidRequest(f"{shape.param} is nested more than {MAX_DEPTH} levels deep.", param=shape.param)
    size = len(json.dumps(shape.value))
    limit = MAX_REGEX_CHARS if shape.kind == "regex" else MAX_CHARS
    if size > limit:
        raise InvalidRequest(f"{shape.param} is too large: at most {limit} characters.", param=shape.param)


def _depth(value: Any) -> int:
    """Levels of lists and objects."""
    depth, level = 0, [value]
    while level:
        level = [child for one in level for child in _children(one)]
        depth += 1
    return depth - 1


def _children(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list | tuple) else ()


def _text(shape: OutputShape) -> str:
    if not isinstance(shape.value, str) or not shape.value:
        raise InvalidRequest(f"{shape.param} must be a text that is not empty.", param=shape.param)
    return shape.value


def _choices(shape: OutputShape) -> list[str]:
    given = list(shape.value) if isinstance(shape.value, list | tuple) else []
    if not given or not all(isinstance(one, str) and one for one in given):
        raise InvalidRequest(f"{shape.param} must be a list of texts that are not empty.", param=shape.param)
    return given


def _regex(pattern: str) -> Entry:
    found: Entry = json.loads(llguidance.LLMatcher.grammar_from_regex(pattern))["grammars"][0]
    return {"lark_grammar": found["lark_grammar"]}


def _grammar(text: str, param: str) -> Entry:
    """Lark, or GBNF turned into it."""
    try:
        return {"lark_grammar": llguidance.grammar_from("grammar", text)}
    except ValueError as error:
        raise InvalidRequest(f"{param} is no Lark or GBNF grammar: {error}", param=param) from error


def _structural(shape: OutputShape, literal: Literal) -> Entry:
    """Free text in which each tag, once its trigger was written, has its form.

    `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, as vLLM takes it.
    """
    value = shape.value if isinstance(shape.value, dict) else {}
    triggers, structures = value.get("triggers"), value.get("structures")
    if not triggers or not structures or not isinstance(triggers, list) or not isinstance(structures, list):
        reason = "must have 'triggers' and 'structures', lists that are not empty; other forms are not supported"
        raise InvalidRequest(f"{shape.param} {reason}.", param=shape.param)
    rules = []
    for i, one in enumerate(structures):
        param = f"{shape.param}.structures.{i}"
        begin, trigger, end = _tag(one, triggers, param=param)
        schema = schema_entry(one.get("schema", {}), is_strict=True, param=f"{param}.schema")["json_schema"]
        rest = literal(begin.removeprefix(trigger))
        rules.append((literal(trigger), f"{rest} %json {json.dumps(schema)} {literal(end)}"))
    names = " | ".join(f"tag{i}" for i in range(len(rules)))
    lines = [f"start: ({names})* TEXT", f"TEXT: {ANY_TEXT}"]
    for i, (trigger, rest) in enumerate(rules):
        if trigger.startswith("<["):
            lines.append(f"tag{i}: TEXT {trigger} {rest}")
        else:
            lines += [f"tag{i}_head[lazy]: TEXT {trigger}", f"tag{i}: tag{i}_head {rest}"]
    return {"lark_grammar": "\n".join(lines)}


def _tag(one: Any, triggers: list[Any], *, param: str) -> tuple[str, str, str]:
    """The tag's beginning, the trigger that it starts with, and its end."""
    begin, end = (one.get("begin"), one.get("end", "")) if isinstance(one, dict) else (None, None)
    if not isinstance(begin, str) or not isinstance(end, str):
        raise InvalidRequest(f"{param} must have the texts 'begin' and 'end', and a 'schema'.", param=param)
    trigger = next((t for t in triggers if isinstance(t, str) and t and begin.startswith(t)), None)
    if trigger is None:
        raise InvalidRequest(f"{param}.begin starts with none of the triggers.", param=f"{param}.begin")
    return begin, trigger, end
