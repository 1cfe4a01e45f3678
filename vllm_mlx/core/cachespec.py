"""What each layer of a model must remember, and in which layout the runner keeps it."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Layout(StrEnum):
    """How one layer keeps its state."""

    PAGES = "pages"
    """Keys and values in pages of `page_size` tokens, found through a page table."""
    ROWS = "rows"
    """Keys and values in one contiguous row per sequence."""
    STATE = "state"
    """A fixed-size recurrent state per sequence; it cannot be cut or shortened."""
    OWN = "own"
    """A cache that only the library understands: kept per sequence, decoded one sequence at a time."""


class LayerSpec(msgspec.Struct, frozen=True):
    """One layer's layout; `window` is the number of tokens a sliding-window layer looks back, itself included."""

    layout: Layout
    window: int | None = None


class CacheSpec(msgspec.Struct, frozen=True):
    """The layers of a model, in order, flattened (a composite layer counts once per part)."""

    layers: tuple[LayerSpec, ...]
    page_size: int
    """Tokens per page."""
    page_bytes: int
    """Bytes of one page over all paged layers."""

    @property
    def is_paged(self) -> bool:
        """Whether any layer uses pages."""
        return any(layer.layout is Layout.PAGES for layer in self.layers)
