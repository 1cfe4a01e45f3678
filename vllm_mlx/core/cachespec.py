"""What each layer of a model must remember, and in which layout the runner keeps it."""

from __future__ import annotations

from enum import StrEnum

import msgspec

MAX_CHUNKS_IN_FLIGHT = 2
"""A chunk of a prompt is planned while the one before it is computed."""


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


class PageGroups(msgspec.Struct, frozen=True):
    """The groups of paged layers: the layers of one read the same pages, and each has a page table of its own.

    Numbers of pages are those of one group unless something else is said. A layer with a window reads, from a page
    boundary on, no more than `reach_back` pages before it, wherever behind the boundary a token stands.
    """

    windows: tuple[int | None, ...]
    """For each group how many tokens its layers look back, the current one included; None for all."""
    page_size: int
    """Tokens per page."""

    @property
    def has_windows(self) -> bool:
        """Whether any group gives pages back while its sequence goes on."""
        return any(window is not None for window in self.windows)

    def reach_back(self, group: int) -> int | None:
        """Pages before a page boundary that tokens behind it may look at; None for all."""
        window = self.windows[group]
        return None if window is None else -(-(window - 1) // self.page_size)

    def first_page(self, group: int, num_tokens: int) -> int:
        """The first page that whoever goes on behind `num_tokens` tokens must still have."""
        back = self.reach_back(group)
        return 0 if back is None else max(0, num_tokens // self.page_size - back)

    def pages_for(self, num_tokens: int, *, num_in_flight: int = 0) -> int:
        """Pages of all groups that a sequence of `num_tokens` tokens has at most while it is computed.

        Pages in a window are those that its tokens look back at, and the one that is written; if more than a page is
        computed at a time, those that `num_in_flight` tokens take.
        """
        num_pages = -(-num_tokens // self.page_size)
        num_new = 1 + -(-num_in_flight // self.page_size)
        backs = (self.reach_back(group) for group in range(len(self.windows)))
        return sum(num_pages if back is None else min(num_pages, back + num_new) for back in backs)

    def most_tokens(self, num_pages: int) -> int | None:
        """The longest sequence that `num_pages` pages of all groups can hold; None if there is no end to it."""
        low, high = 0, num_pages
        if not self.windows or self.pages_for((high + 1) * self.page_size) <= num_pages:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            if self.pages_for(middle * self.page_size) <= num_pages:
                low = middle
            else:
                high = middle - 1
        return low * self.page_size


class CacheSpec(msgspec.Struct, frozen=True):
    """The layers of a model, in order, flattened (a composite layer counts once per part)."""

    layers: tuple[LayerSpec, ...]
    page_size: int
    """Tokens per page."""
    page_bytes: int
    """Bytes of one page, over all paged layers of a group."""
    windows: tuple[int | None, ...] = (None,)
    """Of the groups of paged layers; see `PageGroups`."""

    @property
    def is_paged(self) -> bool:
        """Whether any layer uses pages."""
        return any(layer.layout is Layout.PAGES for layer in self.layers)

    @property
    def page_groups(self) -> PageGroups:
        """The groups of paged layers; none if no layer is paged."""
        return PageGroups(self.windows if self.is_paged else (), self.page_size)
