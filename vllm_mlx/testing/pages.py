"""The pages of a runner without a model: what is in them, and who may write to them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from vllm_mlx.core.cachespec import PageGroups
from vllm_mlx.testing.contract import expect
from vllm_mlx.testing.held import Slot

Tables = tuple[tuple[int, ...], ...]
_MASK = (1 << 24) - 1


class FakePages:
    """Pages by id, each of one group of layers at a time.

    In the first group a place holds a token, unless the group has a window. Elsewhere it holds a number that depends on
    all tokens up to there and on the group, as keys and values do: pages of another prefix or group are noticed.
    """

    def __init__(self, groups: PageGroups, *, num_pages: int) -> None:
        self._groups = groups
        self._num_pages = num_pages
        self._size = groups.page_size
        self._pages: dict[int, list[int]] = {}
        self._users: dict[int, set[int]] = {}
        self._has_tokens = groups.windows[:1] == (None,)

    @property
    def num_used(self) -> int:
        """Pages that a sequence may read or write."""
        return sum(1 for users in self._users.values() if users)

    def clear(self) -> None:
        """Forget everything."""
        self._pages.clear()
        self._users.clear()

    # ---- whole pages ----

    def export(self, page_ids: Sequence[int]) -> list[bytes]:
        """Their bytes."""
        for page in page_ids:
            expect(len(self._pages.get(page, ())) == self._size, f"page {page} is not full")
        return [array("i", self._pages[page]).tobytes() for page in page_ids]

    def take_in(self, imports: Sequence[tuple[int, bytes]]) -> None:
        """Put bytes into pages that nobody uses."""
        expect(len(dict(imports)) == len(imports), "a page is imported twice")
        for page, payload in imports:
            expect(not self._users.get(page), f"page {page} is overwritten by an import while in use")
            self._pages[page] = array("i", payload).tolist()

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages; all sources are read first."""
        for source, target in copies:
            expect(source in self._pages, f"page {source} is copied but was never written")
            expect(0 < target < self._num_pages, f"page {target} cannot be a copy's target")
            expect(not self._users.get(target), f"page {target} is overwritten by a copy while in use")
        self._pages.update([(target, list(self._pages[source])) for source, target in copies])

    # ---- of a sequence ----

    def use(self, slot: Slot, tables: Tables, start: int) -> None:
        """The slot's page tables are now these; its next token stands at `start`."""
        if tables == slot.tables and not self._groups.has_windows:
            return
        num_groups = len(self._groups.windows)
        expect(len(tables) == max(1, num_groups), f"slot {slot.number}: {len(tables)} tables for {num_groups} groups")
        expect(bool(num_groups) or tables == ((),), f"slot {slot.number}: a page table, but no layer is paged")
        slot.tables = tables
        self._use_what_is_seen(slot, start)

    def _use_what_is_seen(self, slot: Slot, start: int) -> None:
        """Pages that no token from `start` on looks at may be another's from now on."""
        page_ids = [
            page
            for group, table in enumerate(slot.tables[: len(self._groups.windows)])
            for page in table[self._first_seen(group, start) // self._size :]
        ]
        in_range = all(0 < page < self._num_pages for page in page_ids)
        expect(in_range, f"slot {slot.number}: a page id out of range, or 0")
        expect(len(set(page_ids)) == len(page_ids), f"slot {slot.number}: a page twice in one table")
        for page in slot.used - set(page_ids):
            self._users[page].discard(slot.number)
        for page in page_ids:
            self._users.setdefault(page, set()).add(slot.number)
        slot.used = set(page_ids)

    def drop(self, slot: Slot) -> None:
        """The slot's sequence ended."""
        for page in slot.used:
            self._users[page].discard(slot.number)

    def write(self, slot: Slot, start: int, token_ids: Sequence[int]) -> None:
        """Put the tokens from `start` on into the slot's pages."""
        end = start + len(token_ids)
        for group, table in enumerate(slot.tables[: len(self._groups.windows)]):
            expect(len(table) * self._size >= end, f"slot {slot.number}: the page table is too short")
            values = self._values(slot, group, start, end)
            for index in range(start // self._size, -(-end // self._size)):
                self._write_page(slot, table[index], max(start - index * self._size, 0), values, index, start)
        if self._groups.has_windows:
            self._use_what_is_seen(slot, end)

    def _write_page(self, slot: Slot, page: int, first: int, values: list[int], index: int, start: int) -> None:
        expect(self._users[page] == {slot.number}, f"page {page} is written by slot {slot.number} while shared")
        # What an earlier sequence left behind the new tokens is gone, so that reading it is noticed.
        held = self._pages.get(page, [])[:first]
        expect(len(held) == first, f"page {page} is written behind a gap")
        at = index * self._size + first - start
        self._pages[page] = held + values[at : (index + 1) * self._size - start]

    def read(self, slot: Slot, num_tokens: int) -> tuple[int, ...]:
        """The first `num_tokens` tokens, as the pages have them, once all that the next token looks at is checked."""
        found = tuple(slot.token_ids[:num_tokens])
        for group, table in enumerate(slot.tables[: len(self._groups.windows)]):
            begin = self._first_seen(group, num_tokens)
            values = self._read(table, begin, num_tokens)
            if group == 0 and self._has_tokens:
                found = tuple(values)
            else:
                expected = self._values(slot, group, begin, num_tokens)
                expect(values == expected, f"slot {slot.number}: the pages of group {group} hold something else")
        return found

    def _read(self, table: tuple[int, ...], begin: int, end: int) -> list[int]:
        found: list[int] = []
        for index in range(begin // self._size, -(-end // self._size)):
            wanted = min(self._size, end - index * self._size)
            values = self._pages.get(table[index], [])[:wanted]
            expect(len(values) == wanted, f"page {table[index]} is read where nothing was written")
            found += values
        return found[begin % self._size :]

    def _first_seen(self, group: int, start: int) -> int:
        """The first position that a token at `start` looks at."""
        window = self._groups.windows[group]
        return 0 if window is None else max(0, start - window + 1)

    def _values(self, slot: Slot, group: int, start: int, end: int) -> list[int]:
        """What places start .. end - 1 of a group hold."""
        if group == 0 and self._has_tokens:
            return slot.token_ids[start:end]
        for token in slot.token_ids[len(slot.chain) : end]:
            slot.chain.append(((slot.chain[-1] if slot.chain else 1) * 69069 + token + 1) & _MASK)
        return [value | group << 24 for value in slot.chain[start:end]]
