"""Base of request bodies: strict types, no unknown fields, a description for every field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

UNSUPPORTED = "unsupported"
"""Error type of a field or value that is well formed but not offered."""


class WireModel(BaseModel):
    """A JSON object of a request. The docstring under a field is its description in the OpenAPI document.

    A field of type `None` is known but not offered: anything but null is refused by name.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def unsupported(message: str) -> PydanticCustomError:
    """To raise in a validator; `message` continues after the field's path: 'is not supported ...'."""
    return PydanticCustomError(UNSUPPORTED, "{reason}", {"reason": message})
