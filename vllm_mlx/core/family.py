"""What we know about a model family, as data. Records live in `families/`, one file per family."""

from __future__ import annotations

import msgspec


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """Facts that differ between model families and cannot be read from the model itself."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    scores_rank: int = 4
    """Rank of the attention scores that the model adds its own mask to; 5 where heads are split into groups."""
    batched_decode: bool = True
    """False if the architecture computes wrong or not at all with one offset per row."""
    unsupported: str | None = None
    """Why this family cannot be served, for the operator."""


DEFAULT = Family(name="default", model_types=())
