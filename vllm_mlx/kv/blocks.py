"""Pages as ids: who may have one, how many use it, and what it is called."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Sequence

SCRATCH_PAGE = 0
"""Padded rows write here; it belongs to nobody."""


def page_name(parent: bytes, token_ids: Sequence[int], *, salt: bytes) -> bytes:
    """The identity of a full page: 16 bytes that depend on every token from the sequence's start, and on the salt.

    `parent` is the name of the page before it, empty for the first.
    """
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(array("q", token_ids).tobytes())
    digest.update(salt)
    return digest.digest()


class PagePool:
    """Hands out pages 1 .. num_pages - 1 and counts their users.

    Free pages are handed out lowest id first, so that a pool whose memory is touched lazily stays as small as its
    peak. A page loses its name when its last user leaves: names identify pages that are alive.
    """

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(SCRATCH_PAGE + 1, num_pages))
        self._num_users: dict[int, int] = {}
        self._names: dict[int, bytes] = {}
        self._by_name: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with at least one user."""
        return len(self._num_users)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take `count` pages, one user each. Raises ValueError if fewer are free (look at `num_free` first)."""
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} free")
        page_ids = tuple(heapq.heappop(self._free) for _ in range(count))
        self._num_users.update(dict.fromkeys(page_ids, 1))
        return page_ids

    def share(self, page_id: int) -> None:
        """One more user of a page in use. Raises KeyError if it is free."""
        self._num_users[page_id] += 1

    def release(self, page_id: int) -> None:
        """One user less; the last one frees the page. Raises KeyError if it is free already."""
        self._num_users[page_id] -= 1
        if self._num_users[page_id]:
            return
        del self._num_users[page_id]
        heapq.heappush(self._free, page_id)
        name = self._names.pop(page_id, None)
        if name is not None and self._by_name.get(name) == page_id:
            del self._by_name[name]

    def set_name(self, page_id: int, name: bytes) -> None:
        """Name a full page. When two pages hold the same tokens, the first one named is found."""
        self._names[page_id] = name
        self._by_name.setdefault(name, page_id)

    def find(self, name: bytes) -> int | None:
        """The page of that name, if one is alive."""
        return self._by_name.get(name)

    def check(self, num_users: dict[int, int], *, num_pages: int) -> None:
        """Raise AssertionError unless the pool agrees with `num_users` (page id to users) and lost no page."""
        assert self._num_users == num_users, f"users {self._num_users}, tables say {num_users}"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert not set(self._free) & set(self._num_users), "a page is both free and used"
        everything = set(self._free) | set(self._num_users)
        assert everything == set(range(SCRATCH_PAGE + 1, num_pages)), "a page is lost or invented"
        assert set(self._names) <= set(self._num_users), "a free page has a name"
        assert all(self._names.get(page) == name for name, page in self._by_name.items()), "a name finds the wrong page"
