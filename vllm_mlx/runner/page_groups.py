"""Which paged layers share a page table, so that pages that no window shows any more can be given to others.

The layers of a group read the same pages, and a page is of one group at a time: it has room for as many layers as a
group has. Groups of few layers waste little, for a layer that is missing in a group takes the room of one that is
there; groups of many need few tables, and few pages to look after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

MAX_GROUPS = 8
WORTH = 0.9
"""Layers stay together unless a long sequence then takes at most so much of their room."""
CLOSE = 1.05
"""Fewer groups are better than so little room."""
LONG = 32_768
"""Tokens of a long sequence."""


class Grouping(msgspec.Struct, frozen=True):
    """The groups of a model's paged layers."""

    windows: tuple[int | None, ...]
    """Of each group the widest of its layers; None if one of them looks back at everything."""
    places: tuple[tuple[int, int], ...]
    """Of each layer its group and its pool: layers of different groups that have the same pool share its memory."""

    @property
    def num_pools(self) -> int:
        """Layers that a page has room for."""
        return 1 + max((pool for _, pool in self.places), default=-1)

    @property
    def is_split(self) -> bool:
        """Whether there is more than one group."""
        return len(self.windows) > 1


def group_layers(windows: Sequence[int | None], *, are_alike: bool) -> Grouping:
    """Groups of layers with these windows; only if layers `are_alike` can they share memory."""
    kinds = sorted(set(windows), key=lambda window: (window is not None, -(window or 0)))
    if len(kinds) > 1 and are_alike:
        members = {kind: [i for i, window in enumerate(windows) if window == kind] for kind in kinds}
        size = _group_size({kind: len(layers) for kind, layers in members.items()})
        if size < len(windows):
            return _split(members, size)
    places = tuple((0, i) for i in range(len(windows)))
    return Grouping((kinds[0] if kinds else None,), places)


def _group_size(counts: dict[int | None, int]) -> int:
    """Layers per group; all of them if nothing is won by splitting them. `counts` has the layers of each window."""
    total = sum(counts.values())
    rooms = {size: _room(counts, size) for size in range(1, total) if _num_groups(counts, size) <= MAX_GROUPS}
    if not rooms or min(rooms.values()) > WORTH * total * LONG:
        return total
    close = [size for size, room in rooms.items() if room <= CLOSE * min(rooms.values())]
    return min(close, key=lambda size: (_num_groups(counts, size), rooms[size]))


def _num_groups(counts: dict[int | None, int], size: int) -> int:
    return sum(-(-count // size) for count in counts.values())


def _room(counts: dict[int | None, int], size: int) -> int:
    """What a long sequence takes: tokens times layers, missing ones included."""
    seen = {window: LONG if window is None else min(LONG, window) for window in counts}
    return sum(-(-count // size) * size * seen[window] for window, count in counts.items())


def _split(members: dict[int | None, list[int]], size: int) -> Grouping:
    """Groups of at most `size` layers, each of one window."""
    parts = [(window, part) for window, layers in members.items() for part in _cut(layers, size)]
    places = {layer: (group, pool) for group, (_, part) in enumerate(parts) for pool, layer in enumerate(part)}
    return Grouping(tuple(window for window, _ in parts), tuple(places[layer] for layer in sorted(places)))


def _cut(layers: list[int], size: int) -> Iterator[list[int]]:
    return (layers[start : start + size] for start in range(0, len(layers), size))
