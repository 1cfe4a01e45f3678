"""The order in which pages are given up."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence

SCRATCH_PAGE = 0
"""Padded rows write here; it belongs to nobody."""


class PageOrder:
    """Page ids in three parts, each in the order in which they were appended; any of them can be taken out at once."""

    _NOWHERE = -1

    def __init__(self, num_pages: int) -> None:
        # A ring through page 0, which is never a member, and through two more that stand between the parts.
        self._next = array("i", [self._NOWHERE]) * (num_pages + 2)
        self._previous = array("i", [self._NOWHERE]) * (num_pages + 2)
        self._early_end, self._late_start = num_pages, num_pages + 1
        ring = (SCRATCH_PAGE, self._early_end, self._late_start, SCRATCH_PAGE)
        for one, other in itertools.pairwise(ring):
            self._next[one], self._previous[other] = other, one
        self.size = 0

    def __contains__(self, page_id: int) -> bool:
        return page_id != SCRATCH_PAGE and self._next[page_id] != self._NOWHERE

    def __iter__(self) -> Iterator[int]:
        page_id = self._next[SCRATCH_PAGE]
        while page_id != SCRATCH_PAGE:
            if page_id < self._early_end:
                yield page_id
            page_id = self._next[page_id]

    def append(self, page_id: int) -> None:
        """Last of those that were appended so."""
        self._insert(page_id, before=self._late_start)

    def append_early(self, page_id: int) -> None:
        """Last of those that come before all that were appended otherwise."""
        self._insert(page_id, before=self._early_end)

    def append_late(self, page_id: int) -> None:
        """Last of all: behind those that were appended otherwise."""
        self._insert(page_id, before=SCRATCH_PAGE)

    @property
    def first_late(self) -> int | None:
        """The first of those appended late."""
        return self._next[self._late_start] or None

    @property
    def first(self) -> int:
        """The first of all; there must be one."""
        page_id = self._next[SCRATCH_PAGE]
        while page_id >= self._early_end:
            page_id = self._next[page_id]
        return page_id

    def remove(self, page_id: int) -> None:
        """Take one out. Raises KeyError if it is not there."""
        self.remove_all((page_id,))

    def remove_all(self, page_ids: Sequence[int]) -> None:
        """Take out all of these, each once. Raises KeyError, and changes nothing, if one is not there."""
        following, previous = self._next, self._previous
        for page_id in page_ids:
            if following[page_id] == self._NOWHERE or page_id == SCRATCH_PAGE:
                raise KeyError(page_id)
        for page_id in page_ids:
            before, after = previous[page_id], following[page_id]
            following[before], previous[after] = after, before
            following[page_id] = previous[page_id] = self._NOWHERE
        self.size -= len(page_ids)

    def pop_first(self) -> int:
        """Take the first of all; there must be one."""
        page_id = self.first
        self.remove(page_id)
        return page_id

    def _insert(self, page_id: int, *, before: int) -> None:
        last = self._previous[before]
        self._next[last] = self._previous[before] = page_id
        self._previous[page_id], self._next[page_id] = last, before
        self.size += 1
