"""What the engine's thread and the disk's thread share, and the figures that they count."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from vllm_mlx.kv.tiers.governor import DailyBudget, WriteSwitch
from vllm_mlx.kv.tiers.index import Index
from vllm_mlx.kv.tiers.queues import LoadQueue, SaveQueue


class Refusal(StrEnum):
    """Why a blob was not written."""

    KNOWN = "known"
    """It is on disk, or queued."""
    TOO_LARGE = "too_large"
    """It alone exceeds the folder's limit or the queue's."""
    QUEUE_FULL = "queue_full"
    """The disk is slower than what comes."""
    DAILY_BUDGET = "daily_budget"
    """Enough was written today."""
    LOW_SPACE = "low_space"
    """The disk has too little space left; writing pauses."""
    WRITE_FAILED = "write_failed"
    """The disk is full, read-only or broken; writing pauses."""
    PAUSED = "paused"
    """Writing pauses after a failure."""
    FORGOTTEN = "forgotten"
    """The cache was emptied while it was queued."""
    CLOSED = "closed"
    """The tier was closed, or its thread has ended."""


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a tier; counts are since it was opened."""

    num_blobs: int
    """Blobs on disk that this model may load."""
    size_bytes: int
    """Of those."""
    folder_bytes: int
    """Of the blobs of all models; `max_bytes` bounds this."""
    queued_bytes: int
    """Memory of what waits to be written."""
    ahead_bytes: int
    """Memory of what was read and not taken yet."""
    num_saved: int
    """Blobs written."""
    bytes_written: int
    """Of those, headers included."""
    bytes_read: int
    """Payloads of the hits."""
    num_hits: int
    """Blobs loaded."""
    num_misses: int
    """Blobs that were asked for and could not be loaded."""
    num_refused: dict[str, int]
    """Blobs that were not written, by reason, see `Refusal`."""
    num_corrupt: int
    """Files that were not what had been written."""
    num_evicted: int
    """Files deleted to make room, of whatever model."""
    is_ready: bool
    """The folder has been looked through."""
    is_writable: bool
    """Writing does not pause."""
    problem: str | None
    """Why the last write failed, or why the tier has ended."""


@dataclass(slots=True)
class Counts:
    """Running figures; guarded by the tier's lock."""

    num_saved: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_corrupt: int = 0
    num_evicted: int = 0
    refused: Counter[Refusal] = field(default_factory=Counter)


@dataclass(slots=True, kw_only=True)
class TierState:
    """Everything here is read and changed under `lock` only, but for `index.has` and the two governors' questions."""

    index: Index
    saves: SaveQueue
    loads: LoadQueue
    budget: DailyBudget
    switch: WriteSwitch
    max_bytes: int
    lock: threading.Condition = field(default_factory=threading.Condition)
    """Notified when there is work for the disk, and when the last of it is done."""
    counts: Counts = field(default_factory=Counts)
    used: deque[str] = field(default_factory=deque)
    """Paths to be counted as used, in that order."""
    num_forgets: int = 0
    must_forget: bool = False
    """The model's files are to be deleted; until that is done none of them is loaded."""
    is_ready: bool = False
    is_closing: bool = False
    has_ended: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be written, dated or deleted."""
        return self.saves.is_idle and not self.used and not self.must_forget

    def refusal(self, path: str, size_bytes: int) -> Refusal | None:
        """Why a file of `size_bytes` would not be queued now; None if it would."""
        queued_bytes = self.saves.size_bytes + size_bytes
        checks = (
            (self.is_closing or self.has_ended, Refusal.CLOSED),
            (self.index.has(path) or path in self.saves, Refusal.KNOWN),
            (size_bytes > min(self.max_bytes, self.saves.max_bytes), Refusal.TOO_LARGE),
            (not self.switch.is_on, Refusal.PAUSED),
            (not self.budget.allows(queued_bytes), Refusal.DAILY_BUDGET),
            (queued_bytes > self.saves.max_bytes, Refusal.QUEUE_FULL),
        )
        return next((reason for is_refused, reason in checks if is_refused), None)

    def end(self) -> None:
        """Nothing more will be read or written: what waits is missing or refused."""
        self.has_ended = True
        self.counts.refused[Refusal.CLOSED] += self.saves.clear()
        self.saves.finish()
        self.loads.void()
        self.used.clear()
        self.must_forget = False

    def stats(self) -> TierStats:
        """The figures now."""
        counts, problem = self.counts, self.switch.problem
        if self.has_ended and not self.is_closing:
            problem = "the thread that reads and writes has ended; restart the server"
        return TierStats(
            num_blobs=self.index.num_own,
            size_bytes=self.index.own_bytes,
            folder_bytes=self.index.size_bytes,
            queued_bytes=self.saves.size_bytes,
            ahead_bytes=self.loads.untaken_bytes,
            num_saved=counts.num_saved,
            bytes_written=counts.bytes_written,
            bytes_read=counts.bytes_read,
            num_hits=counts.num_hits,
            num_misses=counts.num_misses,
            num_refused={reason.value: num for reason, num in counts.refused.items() if num},
            num_corrupt=counts.num_corrupt,
            num_evicted=counts.num_evicted,
            is_ready=self.is_ready,
            is_writable=self.switch.is_on and not self.is_closing and not self.has_ended,
            problem=problem,
        )
