"""What the manager knows of one sequence: its pages, their names, and where its state is to be kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_mlx.kv.blocks import page_names, tail_name


@dataclass(slots=True)
class Table:
    """A sequence's pages in order, and the names of the full ones. Without pages, the names alone."""

    salt: bytes
    breakpoints: tuple[int, ...] = ()
    """Beginnings of its prompt that others are likely to share, in tokens."""
    is_pinned: bool = False
    """Its prompt is to stay."""
    page_ids: tuple[int, ...] = ()
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
