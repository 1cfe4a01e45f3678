"""Pages as ids: who may have one, how many use it, and what it is called."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import struct
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from vllm_mlx.kv.order import SCRATCH_PAGE, PageOrder

TOKEN_BYTES = 8
MAX_PROMISED_SHARE = 2
"""At most one page in so many is promised, so that what others computed is not lost at once."""
MANY_PAGES = 16
"""Worth handing over to NumPy."""


def page_name(parent: bytes, token_ids: Sequence[int], *, salt: bytes) -> bytes:
    """The identity of a full page: 16 bytes that depend on every token from the sequence's start, and on the salt.

    `parent` is the name of the page before it, empty for the first.
    """
    return next(page_names(parent, token_ids, page_size=len(token_ids), salt=salt))


def page_names(parent: bytes, token_ids: Sequence[int], *, page_size: int, salt: bytes) -> Iterator[bytes]:
    """The names of pages that follow each other, the first behind `parent`; `token_ids` fill them."""
    return packed_names(parent, pack(token_ids), page_size=page_size, salt=salt)


def pack(token_ids: Sequence[int]) -> bytes:
    """Token ids as bytes, `TOKEN_BYTES` each."""
    return struct.pack(f"{len(token_ids)}q", *token_ids)  # three times as fast as an array


def packed_names(parent: bytes, packed: bytes, *, page_size: int, salt: bytes) -> Iterator[bytes]:
    """`page_names` of packed tokens."""
    size = page_size * TOKEN_BYTES
    for start in range(0, len(packed), size):
        parent = hashlib.blake2b(parent + packed[start : start + size] + salt, digest_size=16).digest()
        yield parent


def tail_name(parent: bytes, *, salt: bytes) -> bytes:
    """The identity of the partly filled page behind the page `parent`, whatever is in it; no full page's."""
    return hashlib.blake2b(parent, digest_size=16, salt=b"tail", key=hashlib.sha256(salt).digest()).digest()


def group_name(name: bytes, group: int) -> bytes:
    """The name that a page has in a group of layers; in the first group it is `name` itself."""
    return name[:-1] + bytes((name[-1] ^ group,)) if group else name


def group_names(names: Sequence[bytes], group: int) -> Sequence[bytes]:
    """`group_name` of each."""
    return [group_name(name, group) for name in names] if group else names


def common_length(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many numbers both begin with."""
    for count, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return count
    return min(len(ours), len(theirs))


class PagePool:
    """Hands out pages 1 .. num_pages - 1, counts their users, and keeps named pages after their last user left.

    A page is free, in use, or *kept*: named, used by nobody, found by its name until its memory is needed. Free pages
    are handed out first, lowest id first, so that a pool whose memory is touched lazily stays small; then the kept page
    that was *left behind* longest ago, for that one is the least likely to be wanted; then the one that was given back
    longest ago. What is kept per page takes about 150 bytes.
    """

    def __init__(self, num_pages: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._free = list(range(SCRATCH_PAGE + 1, num_pages))
        self._num_users = array("i", bytes(4 * max(1, num_pages)))
        self._users_view = np.frombuffer(self._num_users, np.int32)
        """The same memory: a page by itself is quicker in an array of the standard library, many at once in this."""
        self._names: list[bytes | None] = [None] * max(1, num_pages)
        self._by_name: dict[bytes, int] = {}
        self._tails: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self._by_tail: dict[bytes, int] = {}
        self._was_shared = bytearray(max(1, num_pages))
        self._shared_view = np.frombuffer(self._was_shared, np.uint8)
        self._kept = PageOrder(max(1, num_pages))
        self._clock = clock
        self._until: dict[int, float] = {}
        """By page: when its promise ends."""
        self._last_until = -math.inf
        """No promise ends later."""
        self._most_promised = (num_pages - 1) // MAX_PROMISED_SHARE
        self._held_back: Counter[int] = Counter()
        self.num_used = 0
        """Pages with at least one user."""
        self.num_evicted = 0
        """Kept pages whose memory was needed, since the pool was made."""

    @property
    def num_free(self) -> int:
        """Pages that can be handed out: free ones and kept ones."""
        return len(self._free) + self._kept.size

    @property
    def num_kept(self) -> int:
        """Pages that nobody uses but that can be found."""
        return self._kept.size

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take `count` pages, one user each. Raises ValueError if fewer are free (look at `num_free` first)."""
        if count > self.num_free:
            raise ValueError(f"{count} pages asked for, {self.num_free} free")
        page_ids = tuple(heapq.heappop(self._free) if self._free else self._evict() for _ in range(count))
        for page_id in page_ids:
            self._num_users[page_id] = 1
            self._was_shared[page_id] = False
        self.num_used += count
        return page_ids

    def share(self, page_ids: Sequence[int]) -> list[int]:
        """One more user of each page in use or kept, each once; places of those to which that never happened before.

        The scratch page is passed over. Raises KeyError, and changes nothing, if a page is free.
        """
        if len(page_ids) >= MANY_PAGES:
            index = np.array(page_ids)
            if index.all() and self._users_view[index].all() and self._shared_view[index].all():
                self._users_view[index] += 1  # a prefix that others share, as a rule
                return []
        num_users, was_shared, first = self._num_users, self._was_shared, []
        unused = [page_id for page_id in page_ids if not num_users[page_id] and page_id != SCRATCH_PAGE]
        self._kept.remove_all(unused)
        self.num_used += len(unused)
        for place, page_id in enumerate(page_ids):
            if page_id != SCRATCH_PAGE:
                num_users[page_id] += 1
                if not was_shared[page_id]:
                    was_shared[page_id] = True
                    first.append(place)
        return first

    def touch(self, page_id: int) -> None:
        """Let a kept page be the last to be evicted; one in use is ignored."""
        if page_id in self._kept:
            self._kept.remove(page_id)
            self._keep(page_id)

    def promise(self, names: Iterable[bytes], *, until: float) -> None:
        """Let the pages of these names be evicted after all others, until that time of the clock.

        A promise gives way only to sequences that need the memory to run. It is not given for more than one page in
        `MAX_PROMISED_SHARE`; what is more, of these the last, is kept like all others.
        """
        wanted = dict.fromkeys(filter(None, map(self._by_name.get, names)), until)
        if len(self._until) + len(wanted) > self._most_promised:
            wanted = self._within_share(wanted)
        if until < self._last_until:
            wanted = {page_id: max(end, self._until.get(page_id, end)) for page_id, end in wanted.items()}
        self._until.update(wanted)
        self._last_until = max(until, self._last_until)
        if self.num_kept_of(wanted):
            for page_id in wanted:
                self.touch(page_id)

    def hold_back(self, page_ids: Iterable[int]) -> None:
        """Let kept pages be evicted after those that nobody counts on, until each is let go as often."""
        self._held_back.update(page_ids)

    def let_go(self, page_ids: Iterable[int]) -> None:
        """See `hold_back`."""
        for page_id in page_ids:
            self._held_back[page_id] -= 1
            if self._held_back[page_id] <= 0:
                del self._held_back[page_id]

    def release(self, page_id: int, *, is_left_behind: bool = False) -> None:
        """One user less; the last one frees the page, or leaves it kept. Raises KeyError if nobody uses it.

        What is left behind is evicted before what is given back.
        """
        if self._num_users[page_id] <= 0:
            raise KeyError(page_id)
        self._num_users[page_id] -= 1
        if self._num_users[page_id]:
            return
        self.num_used -= 1
        if self._names[page_id] is None and page_id not in self._tails:
            heapq.heappush(self._free, page_id)
        else:
            self._keep(page_id, is_left_behind=is_left_behind)

    def set_name(self, page_id: int, name: bytes) -> bool:
        """Name a full page in use; False, and nothing changed, if another page has that name already."""
        if self._by_name.setdefault(name, page_id) != page_id:
            return False
        self._names[page_id] = name
        return True

    def set_tail(self, page_id: int, name: bytes, token_ids: tuple[int, ...]) -> None:
        """Note that a page in use begins with `token_ids`, a part of a page; the last one noted has the name."""
        former = self._by_tail.get(name)
        if former is not None and former != page_id:
            self._drop_tail(former)
            if former in self._kept and self._names[former] is None:
                self._kept.remove(former)
                heapq.heappush(self._free, former)
        self._drop_tail(page_id)
        self._by_tail[name] = page_id
        self._tails[page_id] = name, token_ids

    def tail(self, name: bytes) -> tuple[int, tuple[int, ...]] | None:
        """The page noted under that name, and what it begins with."""
        page_id = self._by_tail.get(name)
        return None if page_id is None else (page_id, self._tails[page_id][1])

    def find(self, name: bytes) -> int | None:
        """The page of that name, in use or kept."""
        return self._by_name.get(name)

    def find_run(self, names: Iterable[bytes]) -> list[int]:
        """The pages of these names, up to the first that is not there."""
        found = list(map(self._by_name.get, names, itertools.repeat(SCRATCH_PAGE)))
        return found if all(found) else found[: found.index(SCRATCH_PAGE)]

    def is_kept(self, page_id: int) -> bool:
        """Whether nobody uses the page but it can be found."""
        return page_id in self._kept

    def num_kept_of(self, page_ids: Iterable[int]) -> int:
        """How many of these pages, all in use or kept, nobody uses."""
        return list(map(self._num_users.__getitem__, page_ids)).count(0)

    def forget(self) -> int:
        """Free all kept pages; returns how many there were. Pages in use lose their names."""
        count = self._kept.size
        while self._kept.size:
            heapq.heappush(self._free, self._evict())
        self.num_evicted -= count
        for page_id in self._by_name.values():
            self._names[page_id] = None
        self._by_name.clear()
        self._until.clear()
        self._by_tail.clear()
        self._tails.clear()
        return count

    def check(self, num_users: dict[int, int], *, num_pages: int) -> None:
        """Raise AssertionError unless the pool agrees with `num_users` (page id to users) and lost no page."""
        counted = {page: users for page, users in enumerate(self._num_users) if users}
        assert counted == num_users, f"users {counted}, tables say {num_users}"
        assert self.num_used == len(num_users), "pages in use are miscounted"
        free, kept = set(self._free), set(self._kept)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & kept, "a page is both free and kept"
        assert not (free | kept) & set(num_users), "a page is used and free or kept"
        assert free | kept | set(num_users) == set(range(SCRATCH_PAGE + 1, num_pages)), "a page is lost or invented"
        named = {page: name for page, name in enumerate(self._names) if name is not None}
        assert named == {page: name for name, page in self._by_name.items()}, "names and pages disagree"
        assert kept <= set(named) | set(self._tails), "a page without a name is kept"
        tails = {name: page for page, (name, _) in self._tails.items()}
        assert tails == self._by_tail, "names and tails disagree"
        assert not free & set(self._tails), "a free page has a tail"
        assert not free & set(named), "a free page has a name"

    def _within_share(self, wanted: dict[int, float]) -> dict[int, float]:
        """Those that are promised already, and the first of the others as far as promises may be given."""
        if len(self._until.keys() | wanted.keys()) <= self._most_promised:
            return wanted
        now = self._clock()
        self._until = {page: end for page, end in self._until.items() if end > now}
        others = (page_id for page_id in wanted if page_id not in self._until)
        new = set(itertools.islice(others, max(0, self._most_promised - len(self._until))))
        return {page_id: end for page_id, end in wanted.items() if page_id in self._until or page_id in new}

    def _evict(self) -> int:
        """Take the page kept longest; it is nameless afterwards. Of those promised, the first whose time is over."""
        self._pass_over_held_back()
        late = self._kept.first_late
        if late is not None and self._until.get(late, 0.0) <= self._clock():
            self._kept.remove(late)
            page_id = late
        else:
            page_id = self._kept.pop_first()
        self._until.pop(page_id, None)
        name, self._names[page_id] = self._names[page_id], None
        if name is not None:
            del self._by_name[name]
        self._drop_tail(page_id)
        self.num_evicted += 1
        return page_id

    def _pass_over_held_back(self) -> None:
        """Have a page that nobody counts on come first, if there is one; those before it are kept anew."""
        if len(self._held_back) < self._kept.size:
            for _ in range(len(self._held_back)):
                if self._kept.first not in self._held_back:
                    return
                self.touch(self._kept.first)

    def _keep(self, page_id: int, *, is_left_behind: bool = False) -> None:
        if page_id in self._until:
            self._kept.append_late(page_id)
        elif is_left_behind:
            self._kept.append_early(page_id)
        else:
            self._kept.append(page_id)

    def _drop_tail(self, page_id: int) -> None:
        tail = self._tails.pop(page_id, None)
        if tail is not None:
            del self._by_tail[tail[0]]
