"""What waits for the disk: blobs to be written, and names to be read ahead. Both are guarded by the tier's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NewType

from vllm_mlx.core.step import Staged
from vllm_mlx.kv.tiers.record import Kind

Ticket = NewType("Ticket", int)
"""One call of `SsdTier.load`."""


class Save(NamedTuple):
    """A blob on its way to the disk."""

    path: str
    kind: Kind
    name: bytes
    payload: memoryview | Staged


class Read(NamedTuple):
    """A blob to be read for a ticket."""

    ticket: Ticket
    kind: Kind
    name: bytes


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of a ticket since it was asked last."""

    blobs: dict[bytes, bytes]
    """Payloads by name, in the order in which they were asked for."""
    missing: tuple[bytes, ...]
    """Names that are not on disk, or not readable."""
    is_done: bool
    """Nothing more will come; the ticket is void."""


class SaveQueue:
    """Blobs in the order of arrival; never more than `max_bytes`, the one that is being written included.

    Those that are staged hold memory of the device, so they are copied before anything is written: see `next_staged`.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        """Memory of what is queued, and of what is being written."""
        self._waiting: dict[str, Save] = {}
        self._staged: deque[str] = deque()
        self._current: Save | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is being written."""
        return not self._waiting and self._current is None

    def __contains__(self, path: str) -> bool:
        return path in self._waiting or (self._current is not None and self._current.path == path)

    def add(self, save: Save) -> None:
        """Queue a blob that is not queued and for which there is room."""
        self._waiting[save.path] = save
        self.size_bytes += save.payload.nbytes
        if not isinstance(save.payload, memoryview):
            self._staged.append(save.path)

    def next_staged(self) -> tuple[Save, Staged] | None:
        """A blob whose bytes are to be taken now; then call `settle`."""
        while self._staged:
            save = self._waiting.get(self._staged.popleft())
            if save is not None and not isinstance(save.payload, memoryview):
                return save, save.payload
        return None

    def settle(self, save: Save, payload: memoryview | None) -> None:
        """Its bytes are in plain memory, or cannot be had: then it is given up. It may be gone meanwhile."""
        if self._waiting.get(save.path) is not save:
            return
        if payload is None:
            del self._waiting[save.path]
            self.size_bytes -= save.payload.nbytes
        else:
            self._waiting[save.path] = save._replace(payload=payload)

    def start(self) -> Save | None:
        """The next blob, to be written now; None if nothing waits."""
        if not self._waiting:
            return None
        self._current = self._waiting.pop(next(iter(self._waiting)))
        return self._current

    def finish(self) -> None:
        """The current blob is written, or given up."""
        if self._current is not None:
            self.size_bytes -= self._current.payload.nbytes
            self._current = None

    def clear(self) -> int:
        """Drop everything that is not being written yet; returns how many."""
        num_dropped = len(self._waiting)
        self.size_bytes -= sum(save.payload.nbytes for save in self._waiting.values())
        self._waiting.clear()
        self._staged.clear()
        return num_dropped


@dataclass(slots=True)
class _Reading:
    """The state of a ticket."""

    kind: Kind
    names: tuple[bytes, ...]
    num_started: int = 0
    num_delivered: int = 0
    untaken: dict[bytes, bytes] = field(default_factory=dict)
    missing: list[bytes] = field(default_factory=list)
    found: list[bytes] = field(default_factory=list)


class LoadQueue:
    """Tickets in the order of arrival. Reading pauses while more than `max_bytes` were read and not taken.

    A ticket of which nothing waits to be taken gets its next blob nevertheless, so that no owner who is slow to take
    holds up the others.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.untaken_bytes = 0
        """Memory of what was read and not taken."""
        self._readings: dict[Ticket, _Reading] = {}
        self._num_tickets = 0

    def add(self, names: Sequence[bytes], kind: Kind) -> Ticket:
        """Queue names, to be read in this order; a name that comes twice is read once."""
        self._num_tickets += 1
        ticket = Ticket(self._num_tickets)
        self._readings[ticket] = _Reading(kind, tuple(dict.fromkeys(names)))
        return ticket

    def start(self) -> Read | None:
        """The next name to be read; None if there is none, or none may be read now."""
        for ticket, reading in self._readings.items():
            may_read = not reading.untaken or self.untaken_bytes < self._max_bytes
            if may_read and reading.num_started < len(reading.names):
                reading.num_started += 1
                return Read(ticket, reading.kind, reading.names[reading.num_started - 1])
        return None

    def deliver(self, read: Read, payload: bytes | None) -> list[bytes]:
        """Hand over what was read; returns all names that the ticket found when this was its last, else none."""
        reading = self._readings.get(read.ticket)
        if reading is None or reading.num_delivered == len(reading.names):  # cancelled, or void
            return []
        reading.num_delivered += 1
        if payload is None:
            reading.missing.append(read.name)
        else:
            reading.untaken[read.name] = payload
            reading.found.append(read.name)
            self.untaken_bytes += len(payload)
        return reading.found if reading.num_delivered == len(reading.names) else []

    def take(self, ticket: Ticket) -> Loaded:
        """What was delivered since the last time. A ticket that is not known is done, and nothing came of it."""
        reading = self._readings.get(ticket)
        if reading is None:
            return Loaded({}, (), is_done=True)
        is_done = reading.num_delivered == len(reading.names)
        loaded = Loaded(reading.untaken, tuple(reading.missing), is_done)
        self.untaken_bytes -= sum(map(len, reading.untaken.values()))
        reading.untaken, reading.missing = {}, []
        if is_done:
            del self._readings[ticket]
        return loaded

    def cancel(self, ticket: Ticket) -> None:
        """Drop a ticket and what was read for it; one that is not known is ignored."""
        reading = self._readings.pop(ticket, None)
        if reading is not None:
            self.untaken_bytes -= sum(map(len, reading.untaken.values()))

    def void(self) -> None:
        """Nothing that was asked for will come, nor what was read and not taken: all of it is missing."""
        for reading in self._readings.values():
            self.untaken_bytes -= sum(map(len, reading.untaken.values()))
            reading.missing += [*reading.untaken, *reading.names[reading.num_delivered :]]
            reading.untaken = {}
            reading.num_started = reading.num_delivered = len(reading.names)
