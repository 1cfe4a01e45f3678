"""What the manager knows of one sequence: its pages, their names, and where its state is to be kept."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_mlx.kv.blocks import page_names, tail_name
from vllm_mlx.kv.order import SCRATCH_PAGE


@dataclass(slots=True)
class Table:
    """A sequence's pages in order, in each group of layers, and the names of the full ones.

    The names are those of the first group. Without pages, they are all there is.
    """

    salt: bytes
    breakpoints: tuple[int, ...] = ()
    """Beginnings of its prompt that others are likely to share, in tokens."""
    is_pinned: bool = False
    """Its prompt is to stay."""
    keeps: tuple[tuple[int, int], ...] = ()
    """Beginnings of its prompt that are given up last: tokens, and for how many seconds."""
    blocks: tuple[int, ...] = ()
    """See `Prompt.blocks`."""
    tables: tuple[tuple[int, ...], ...] = ()
    """Its pages in each group; 0 for those that were left behind."""
    row_tables: tuple[tuple[int, ...], tuple[tuple[int, ...], ...]] = ((), ())
    """The same, apart: of the first group, and of the others."""
    first_pages: list[int] = field(default_factory=list)
    """Of each group: pages before that one were left behind."""
    num_passed: int = 0
    """Pages that are full; what their end left behind was given back."""
    num_covered: int = 0
    """Tokens that the tables of all groups have pages for."""
    num_wanted: int = 0
    """Tokens that it was admitted for."""
    num_promised: int = 0
    """Pages that it will still take until those are computed."""
    cuts: list[int] = field(default_factory=list)
    """Where another prompt is likely to part from this one, rising, in full pages. Known if a group has a window."""
    names: list[bytes] = field(default_factory=list)
    """Of full pages of known tokens, as far as they were needed."""
    num_known: int = 0
    """Known tokens when it got its pages."""
    num_computed: int = 0
    """Tokens in its pages, as far as that has been told."""
    num_named: int = 0
    """Pages that are full, in order; all of them have been offered under their names."""
    announced: list[bytes] = field(default_factory=list)
    """Names of the pages, or of the checkpoints, that this sequence has promised."""
    stops: list[int] = field(default_factory=list)
    """Where its prefill must pause, rising, for a state is to be kept there."""
    last_checkpoint: int | None = None
    """The newest that was taken while it decoded: the next one takes its place."""
    awaited: bytes | None = None
    """A name that another has promised, until which it waits."""
    was_read: bool = False
    """What the disk has of it was loaded, or is not wanted."""

    @property
    def page_ids(self) -> tuple[int, ...]:
        """Its pages in the first group."""
        return self.tables[0] if self.tables else ()

    @property
    def held(self) -> list[int]:
        """The pages that it uses, of all groups."""
        return [page_id for page_ids in self.tables for page_id in page_ids if page_id != SCRATCH_PAGE]

    def check(self) -> None:
        """Raise AssertionError if it has a page twice, none where it needs one, or one where it needs none."""
        held = self.held
        assert len(set(held)) == len(held), "a page twice in one table"
        num_left_behind = sum(self.first_pages)
        assert len(held) + num_left_behind == sum(map(len, self.tables)), "a page is missing, or held for nothing"
        assert all(self.num_named <= len(page_ids) for page_ids in self.tables), "more names than pages"

    def is_near_cut(self, index: int, *, back: int) -> bool:
        """Whether the page is one of the last `back` before a cut."""
        following = bisect_right(self.cuts, index)
        return following < len(self.cuts) and index >= self.cuts[following] - back

    def name_pages(self, token_ids: Sequence[int], count: int, *, page_size: int) -> list[bytes]:
        """Names of at least the first `count` pages; each is computed once."""
        names = self.names
        if len(names) < count:
            tokens = token_ids[len(names) * page_size : count * page_size]
            names += page_names(names[-1] if names else b"", tokens, page_size=page_size, salt=self.salt)
        return names

    def tail_name(self, num_pages: int) -> bytes:
        """Name of the partly filled page behind the first `num_pages`, whose names are known."""
        return tail_name(self.names[num_pages - 1] if num_pages else b"", salt=self.salt)


def stops(points: Iterable[int], *, start: int, num_known: int, page_size: int, interval: int) -> list[int]:
    """Page boundaries behind `start` at which a state is kept: the given points, every `interval` tokens, the end."""
    last = (num_known - 1) // page_size * page_size
    wanted = {min(last, point // page_size * page_size) for point in points}
    wanted.update(range(interval, last, interval), (last,))
    return sorted(stop for stop in wanted if stop > start)


def cuts(points: Iterable[int], *, num_shared: int, num_known: int, page_size: int) -> list[int]:
    """Where another prompt may part from one of `num_known` tokens, in full pages.

    At the given points, where this one parted from another (`num_shared` pages), and at the end; a repetition computes
    its last token again.
    """
    wanted = {min(point, num_known) // page_size for point in points}
    return sorted({*wanted, num_shared, (num_known - 1) // page_size, num_known // page_size})
