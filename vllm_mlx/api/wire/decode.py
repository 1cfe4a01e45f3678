"""From the bytes of a body to a checked record, or to one clear error that names the field."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, from_json

from vllm_mlx.api.wire.base import UNSUPPORTED, WireModel
from vllm_mlx.core.errors import InvalidRequest

Body = TypeVar("Body", bound=WireModel)
Path = tuple[str | int, ...]

_EXPECTED = "Input should be "
_MAX_MISTAKES = 1000
"""Listing more than these in full would hold up every other request."""


def decode(raw: bytes, model: type[Body]) -> Body:
    """Check a JSON body.

    Raises:
        InvalidRequest: it is not JSON, or not what `model` describes; `param` is the dotted path of the field, and
            absent where more fields are wrong than can be looked at without holding up other requests.
    """
    if not raw.strip():
        raise InvalidRequest("The body is empty; a JSON object is required.", code="invalid_json")
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        if (count := error.error_count()) > _MAX_MISTAKES:
            raise InvalidRequest(f"The body has {count} wrong or unknown fields, too many to name one.") from error
        found = error.errors(include_url=False)
    raise explain(found, raw, model)


def explain(found: list[ErrorDetails], raw: bytes, model: type[WireModel]) -> InvalidRequest:
    """The one error of several that says most: the one that lies deepest in the body."""
    if found[0]["type"] == "json_invalid":
        reason = found[0]["ctx"]["error"]
        return InvalidRequest(f"The body is not valid JSON: {reason}.", code="invalid_json")
    body = from_json(raw)
    if not isinstance(body, dict):
        return InvalidRequest("The body must be a JSON object.")
    placed = [(_place(error, body), error) for error in found]
    deepest = max((path for path, _ in placed), key=len)
    return _message(deepest, [error for path, error in placed if path == deepest], model)


def _place(error: ErrorDetails, body: Any) -> Path:
    """The path of an error as the caller wrote it: without the names that choices between types add."""
    is_missing = error["type"] == "missing"
    loc = error["loc"][:-1] if is_missing else error["loc"]
    found = list(_walks(body, loc))
    # A name that a choice added may be a key, too: the walk that ends at what was wrong is the right one.
    path = next((path for path, end in found if end == error["input"]), found[0][0])
    if is_missing:
        path = (*path, error["loc"][-1])
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        path = (*path, error["ctx"]["discriminator"].strip("'"))
    return path


def _walks(at: Any, loc: Path) -> Iterator[tuple[Path, Any]]:
    """The ways to follow a location through a body, and where each ends."""
    if not loc:
        yield (), at
        return
    step, rest = loc[0], loc[1:]
    is_key = isinstance(at, dict) and step in at
    is_place = isinstance(at, list) and isinstance(step, int)
    if is_key or is_place:
        yield from (((step, *path), end) for path, end in _walks(at[step], rest))
    if not is_place and (not is_key or step in (at.get("type"), at.get("role"))):
        yield from _walks(at, rest)


def _message(path: Path, errors: list[ErrorDetails], model: type[WireModel]) -> InvalidRequest:
    """Say what is wrong at one place."""
    param = ".".join(map(str, path))
    # Of a choice between types, the branches whose type was right say more than those whose type was wrong.
    errors = [error for error in errors if not error["type"].endswith("_type")] or errors
    text, code = _say(param, errors[0], _field(path, model))
    if text is None:
        expected = dict.fromkeys(error["msg"].removeprefix(_EXPECTED) for error in errors)
        text = f"{param} must be {' or '.join(expected)}{_given(errors[0]['input'])}."
    if code == "unknown_parameter":
        text += _hint(path, model)
    return InvalidRequest(text, param=param, code=code)


def _say(param: str, error: ErrorDetails, field: FieldInfo | None) -> tuple[str | None, str]:
    """Message and code of one error; no message where several choices are to be named together."""
    text: str | None = f"{param}: {error['msg'].removeprefix('Value error, ')}."
    code = "invalid_value"
    match error["type"]:
        case "missing" | "union_tag_not_found":
            text, code = f"{param} is required.", "missing_required_parameter"
        case "extra_forbidden":
            text, code = f"Unrecognized field '{param}'.", "unknown_parameter"
        case "none_required":
            about = (field.description if field else None) or ""
            text, code = f"{param} is not supported. {about}".strip(), "unsupported_parameter"
        case "union_tag_invalid":
            text = f"{param} must be one of {error['ctx']['expected_tags']}."
        case "too_short":
            text = f"{param} must have at least {error['ctx']['min_length']} entry."
        case "too_long":
            text = f"{param} must have at most {error['ctx']['max_length']} entries."
        case kind if kind == UNSUPPORTED:
            text, code = f"{param} {error['msg']}.", "unsupported_value"
        case _ if error["msg"].startswith(_EXPECTED):
            text = None
    return text, code


def _field(path: Path, model: type[WireModel]) -> FieldInfo | None:
    return model.model_fields.get(str(path[0])) if len(path) == 1 else None


def _hint(path: Path, model: type[WireModel]) -> str:
    """A name that was perhaps meant."""
    close = difflib.get_close_matches(str(path[0]), list(model.model_fields), n=1) if len(path) == 1 else []
    return f" Did you mean '{close[0]}'?" if close else ""


def _given(value: Any) -> str:
    """What was sent, when it is a number or a truth value; texts are the caller's and are not repeated."""
    shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else value
    return f", not {shown}" if isinstance(value, int | float) else ""
