"""Which formats a model writes, told from its chat template and its type."""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from vllm_mlx.chat.formats import tool_formats
from vllm_mlx.chat.reasoning import REASONING_FORMATS


class Detected(msgspec.Struct, frozen=True):
    """Names of formats; None where the template shows none."""

    tools: str | None = None
    reasoning: str | None = None


class _Recognisable(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def signatures(self) -> tuple[str, ...]: ...
    @property
    def model_types(self) -> tuple[str, ...]: ...


F = TypeVar("F", bound=_Recognisable)


def detect(template: str, model_type: str) -> Detected:
    """The formats whose marks a chat template contains; the more of them, the surer. Else those of the model type."""
    return Detected(_best(tool_formats(), template, model_type), _best(REASONING_FORMATS, template, model_type))


def _best(formats: tuple[F, ...], template: str, model_type: str) -> str | None:
    seen = [form for form in formats if form.signatures and all(mark in template for mark in form.signatures)]
    if seen:
        return max(seen, key=lambda form: (len(form.signatures), model_type in form.model_types)).name
    return next((form.name for form in formats if model_type in form.model_types), None)
