"""Fields that say what an answer must look like: OpenAI's and vLLM's, to one shape."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.shape import OutputShape, ShapeKind

Schema = dict[str, Any] | bool


class JsonSchema(WireModel):
    """A schema with a name."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    """Letters, digits, `_` and `-`, at most 64."""
    description: str | None = None
    """Accepted; put it into the messages if the model shall know it."""
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    """The JSON schema; without one the answer is any JSON object."""
    strict: bool | None = None
    """True: a keyword that cannot be enforced is refused. Otherwise it is left to the model."""


class TextFormat(WireModel):
    """Any text."""

    type: Literal["text"]
    """`text`."""
    json_schema: None = None
    """Belongs to another type."""


class JsonObjectFormat(WireModel):
    """A JSON object."""

    type: Literal["json_object"]
    """`json_object`."""
    json_schema: None = None
    """Belongs to another type."""


class JsonSchemaFormat(WireModel):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    """`json_schema`."""
    json_schema: JsonSchema
    """The schema."""


class StructuralTagFormat(WireModel):
    """Text with marked parts that match schemas, as vLLM takes it."""

    type: Literal["structural_tag"]
    """`structural_tag`."""
    structures: list[dict[str, Any]]
    """Objects with `begin`, `schema` and `end`."""
    triggers: list[str]
    """What opens one of the structures; each `begin` starts with one of them."""


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat, Field(discriminator="type")
]


class StructuredOutputs(WireModel):
    """vLLM's form of the same; exactly one field."""

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    """A JSON schema, or its text."""
    regex: str | None = None
    """A regular expression that the whole answer matches."""
    choice: list[str] | None = None
    """The answer is one of these."""
    grammar: str | None = None
    """A grammar in Lark or GBNF."""
    json_object: bool | None = None
    """True: the answer is a JSON object."""
    structural_tag: dict[str, Any] | str | None = None
    """`structures` and `triggers`, or their text."""


class ShapeFields(WireModel):
    """What the answer must look like; at most one of the fields."""

    response_format: ResponseFormat | None = None
    """`text`, `json_object`, `json_schema` or `structural_tag`; guaranteed while tokens are chosen."""
    structured_outputs: StructuredOutputs | None = None
    """One of `json`, `regex`, `choice`, `grammar`, `json_object` and `structural_tag`."""
    guided_json: Schema | str | None = None
    """Older name of `structured_outputs.json`."""
    guided_regex: str | None = None
    """Older name of `structured_outputs.regex`."""
    guided_choice: list[str] | None = None
    """Older name of `structured_outputs.choice`."""
    guided_grammar: str | None = None
    """Older name of `structured_outputs.grammar`."""

    def shape(self) -> OutputShape | None:
        """The one shape that was asked for. Raises InvalidRequest if there are several."""
        given = self.structured_outputs
        inner = [] if given is None else _shapes("structured_outputs.", _FIELDS, given)
        if given is not None and len(inner) != 1:
            names = ", ".join(name for name, _, _ in _FIELDS)
            raise InvalidRequest(f"structured_outputs needs exactly one of {names}.", param="structured_outputs")
        shapes = [*_of_format(self.response_format), *inner, *_shapes("guided_", _GUIDED, self)]
        if len(shapes) > 1:
            raise InvalidRequest(
                f"{shapes[0].param} and {shapes[1].param} exclude each other; send one of them.", param=shapes[1].param
            )
        return shapes[0] if shapes else None


_FIELDS: tuple[tuple[str, str, ShapeKind], ...] = (
    ("json", "json_", "json_schema"),
    ("regex", "regex", "regex"),
    ("choice", "choice", "choice"),
    ("grammar", "grammar", "grammar"),
    ("json_object", "json_object", "json_object"),
    ("structural_tag", "structural_tag", "structural_tag"),
)
"""Name in the request, attribute, kind of shape."""
_GUIDED = tuple((name, f"guided_{name}", kind) for name, _, kind in _FIELDS[:4])


def _shapes(
    prefix: str, fields: tuple[tuple[str, str, ShapeKind], ...], body: StructuredOutputs | ShapeFields
) -> list[OutputShape]:
    found = [(f"{prefix}{name}", getattr(body, attribute), kind) for name, attribute, kind in fields]
    return [_shape(kind, value, param) for param, value, kind in found if value is not None and value is not False]


def _shape(kind: ShapeKind, value: Any, param: str) -> OutputShape:
    if kind == "json_object":
        return OutputShape(kind, None, param)
    if kind in ("json_schema", "structural_tag") and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{param} is not valid JSON.", param=param) from error
    return OutputShape(kind, tuple(value) if kind == "choice" else value, param)


def _of_format(given: ResponseFormat | None) -> list[OutputShape]:
    match given:
        case JsonObjectFormat():
            return [OutputShape("json_object", None, "response_format")]
        case JsonSchemaFormat(json_schema=wanted) if wanted.schema_ is None:
            return [OutputShape("json_object", None, "response_format.json_schema")]
        case JsonSchemaFormat(json_schema=wanted):
            param, is_strict = "response_format.json_schema.schema", wanted.strict is True
            return [OutputShape("json_schema", wanted.schema_, param, is_strict)]
        case StructuralTagFormat(structures=structures, triggers=triggers):
            value = {"structures": structures, "triggers": triggers}
            return [OutputShape("structural_tag", value, "response_format")]
    return []
