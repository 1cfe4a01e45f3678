"""Which files lie in the folder, how large they are, and which was used longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

_REFRESH_NS = 60 * 1_000_000_000
"""How far a file's time may lag behind its last use; a refresh for every hit would cost a write each."""


@dataclass(slots=True)
class _Entry:
    size_bytes: int
    used_at_ns: int
    dated_ns: int
    """The time that the file itself carries."""
    scan: int
    """The scan that saw it last."""
    is_readable: bool = True


class Index:
    """Files by path relative to the folder, in order of last use. `own_prefix` begins the paths that may be loaded.

    `has` may be called from any thread; everything else is guarded by the tier's lock.
    """

    def __init__(self, own_prefix: str) -> None:
        self._own_prefix = own_prefix
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._scan = 0
        self.size_bytes = 0
        """Of all files, those of other models included."""
        self.num_own = 0
        """Files of this model."""
        self.own_bytes = 0
        """Of those."""

    def has(self, path: str) -> bool:
        """Whether the file is there, and was not found to be unreadable."""
        entry = self._entries.get(path)
        return entry is not None and entry.is_readable

    def add(self, path: str, *, size_bytes: int, dated_ns: int) -> None:
        """A file was written or found; it counts as used when it says so, but never earlier than known before."""
        old = self._entries.get(path)
        same = old is not None and (old.size_bytes, old.dated_ns) == (size_bytes, dated_ns)
        entry = _Entry(size_bytes, dated_ns, dated_ns, self._scan)
        if old is not None:
            entry.used_at_ns = max(old.used_at_ns, dated_ns)
            entry.is_readable = old.is_readable if same else True
            self._count(path, old, sign=-1)
        self._entries[path] = entry
        self._count(path, entry, sign=1)

    def drop(self, path: str) -> None:
        """The file is gone."""
        entry = self._entries.pop(path, None)
        if entry is not None:
            self._count(path, entry, sign=-1)

    def mark_unreadable(self, path: str) -> None:
        """The file stays and counts, but is not offered until another takes its place."""
        if path in self._entries:
            self._entries[path].is_readable = False

    def use(self, path: str, at_ns: int) -> bool:
        """The file is the one used last; True if the file should be dated `at_ns` too."""
        entry = self._entries.get(path)
        if entry is None:
            return False
        entry.used_at_ns = at_ns
        self._entries.move_to_end(path)
        if at_ns - entry.dated_ns < _REFRESH_NS:
            return False
        entry.dated_ns = at_ns
        return True

    def oldest(self) -> str | None:
        """The file that was used longest ago, of whatever model."""
        return next(iter(self._entries), None)

    def begin_scan(self) -> None:
        """Files that are not added from here to `end_scan` are gone."""
        self._scan += 1

    def end_scan(self) -> None:
        """Drop what the scan did not see, and put files that it found in their place by time."""
        for path in [path for path, entry in self._entries.items() if entry.scan != self._scan]:
            self.drop(path)
        self._entries = OrderedDict(sorted(self._entries.items(), key=lambda item: item[1].used_at_ns))

    def forget_own(self) -> int:
        """Drop every file that may be loaded; returns how many."""
        own = [path for path in self._entries if path.startswith(self._own_prefix)]
        for path in own:
            self.drop(path)
        return len(own)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def _count(self, path: str, entry: _Entry, *, sign: int) -> None:
        self.size_bytes += sign * entry.size_bytes
        if path.startswith(self._own_prefix):
            self.num_own += sign
            self.own_bytes += sign * entry.size_bytes
