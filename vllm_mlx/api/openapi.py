"""The OpenAPI document: bodies and answers are described by the records that decode and encode them."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from vllm_mlx.api.wire.answers import ErrorAnswer
from vllm_mlx.api.wire.base import WireModel

_REF = "#/components/schemas/"


def json_body(*models: type[WireModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: the schema of a body that the endpoint decodes itself, one of `models`."""
    schemas = [model.model_json_schema(ref_template=_REF + "{model}") for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def json_answers(
    answer: type[msgspec.Struct], *, is_streamed: bool = False, error: type[msgspec.Struct] = ErrorAnswer
) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: the answer, and the shape of every error."""
    content: dict[str, Any] = {"application/json": {"schema": _schema(answer)}}
    if is_streamed:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        200: {"description": "The answer.", "content": content},
        "default": {"description": "An error.", "content": {"application/json": {"schema": _schema(error)}}},
    }


def install(app: FastAPI) -> None:
    """Make `app.openapi()` move the schemas' definitions to the place where the references expect them."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            definitions = found.setdefault("components", {}).setdefault("schemas", {})
            _hoist(found["paths"], definitions)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _schema(record: type[msgspec.Struct]) -> dict[str, Any]:
    (schema,), definitions = msgspec.json.schema_components([record], ref_template=_REF + "{name}")
    return {**schema, "$defs": definitions}


def _hoist(node: Any, definitions: dict[str, Any]) -> None:
    if isinstance(node, dict):
        definitions.update(node.pop("$defs", {}))
        for value in node.values():
            _hoist(value, definitions)
    elif isinstance(node, list):
        for value in node:
            _hoist(value, definitions)
