"""What an answer must look like, in no vendor's dialect."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

ShapeKind = Literal["json_schema", "json_object", "regex", "choice", "grammar", "structural_tag"]


class OutputShape(msgspec.Struct, frozen=True):
    """A form that is guaranteed: tokens that would leave it are never chosen."""

    kind: ShapeKind
    value: Any = None
    """A JSON schema (dict or bool), a regular expression, a tuple of texts, a grammar (Lark or EBNF), or structural
    tags; None for 'json_object'."""
    param: str = "response_format"
    """The request's field that asked for it, for errors."""
    is_strict: bool = True
    """Of a JSON schema: False leaves to the model what cannot be enforced, instead of refusing it."""
