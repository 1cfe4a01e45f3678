"""Marks of beginnings that later requests share."""

from __future__ import annotations

from typing import Literal

from vllm_mlx.api.wire.base import WireModel


class CacheControl(WireModel):
    """Ends a beginning of the prompt that later requests share."""

    type: Literal["ephemeral"]
    """`ephemeral`."""
    ttl: Literal["5m", "1h"] | None = None
    """How long it is kept after its last use; `5m` if absent."""
    scope: str | None = None
    """Accepted, as Claude Code sends it; who shares prefixes is the server's setting."""


class Cacheable(WireModel):
    """What every block may have."""

    cache_control: CacheControl | None = None
    """Ends a beginning of the prompt that later requests share; it counts at the end of its message."""


def keep_s(control: CacheControl | None) -> int:
    """Seconds that a marked beginning is kept; 0 for what is not marked."""
    if control is None:
        return 0
    return 3600 if control.ttl == "1h" else 300
