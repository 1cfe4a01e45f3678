"""What of the cache goes to the disk, and what comes back: pages and checkpoints by name, bytes passed through."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError
from vllm_mlx.core.log import get_logger
from vllm_mlx.core.messages import DiskStats
from vllm_mlx.core.step import RunnerInfo, Staged
from vllm_mlx.kv.tiers.queues import Ticket
from vllm_mlx.kv.tiers.record import Kind
from vllm_mlx.kv.tiers.ssd import SsdTier, open_tier

log = get_logger("kv")

SCAN_TIMEOUT_S = 30.0
"""A folder that takes longer to look through is known in part when the first request comes."""
WRITE_OUT_TIMEOUT_S = 2.0
MAX_STEP_BYTES = 64 << 20
"""That leave with one step, unless one checkpoint has more: they hold memory of the device until they are taken."""
STALL_S = 5.0
"""A disk that gives nothing for so long is not waited for: what it has is computed."""
STALL_PAUSE_S = 60.0
"""Until such a disk is asked again."""


class Export(NamedTuple):
    """A page or checkpoint on its way out."""

    kind: Kind
    name: bytes
    number: int
    """Page id, or number of the checkpoint."""


class _Offer(NamedTuple):
    kind: Kind
    name: bytes
    size_bytes: int


class _Load(NamedTuple):
    ticket: Ticket
    kind: Kind


class DiskCache:
    """Keeps a tier supplied, and reads ahead for sequences that wait.

    Only what was used twice, or is pinned, is offered: most prompts never come again, and disks wear out. `page_bytes`
    is the size of a page's payload.
    """

    def __init__(self, tier: SsdTier, *, page_bytes: int) -> None:
        self._tier = tier
        self._page_bytes = page_bytes
        self._wanted: deque[_Offer] = deque()
        self._leaving: dict[tuple[Kind, bytes], int] = {}
        """What steps under way give out, and bytes of each."""
        self._loads: dict[str, list[_Load]] = {}
        self._num_answered = 0
        self._answered_at = 0.0
        self._asked_again_at = 0.0

    @property
    def num_loading(self) -> int:
        """Sequences that wait for the disk."""
        return len(self._loads)

    @property
    def has_exports(self) -> bool:
        """Whether anything is to be written."""
        return bool(self._wanted)

    def stats(self) -> DiskStats:
        """The figures now; what steps under way give out counts as queued."""
        figures = msgspec.convert(self._tier.stats(), DiskStats, from_attributes=True)
        return msgspec.structs.replace(figures, queued_bytes=figures.queued_bytes + sum(self._leaving.values()))

    def close(self) -> None:
        """Wait a little for what is being written, and end the disk's thread."""
        self._tier.flush(WRITE_OUT_TIMEOUT_S)
        self._tier.close()

    # ---- out ----

    def offer(self, kind: Kind, name: bytes, *, size_bytes: int | None = None) -> None:
        """Something was used again: it is worth a place on the disk, unless it has one."""
        size_bytes = size_bytes or self._page_bytes
        if self._tier.wants(name, size_bytes, kind=kind):
            self._wanted.append(_Offer(kind, name, size_bytes))

    def take_exports(self, limit: int, *, find: Callable[[Kind, bytes], int | None]) -> tuple[Export, ...]:
        """The next few of what was offered, pages first; `find` says where each is now, None if it is gone."""
        taken: list[Export] = []
        size_bytes = 0
        while self._wanted and len(taken) < limit:
            kind, name, offered_bytes = self._wanted[0]
            if taken and size_bytes + offered_bytes > MAX_STEP_BYTES:
                break
            self._wanted.popleft()
            number = find(kind, name)
            if number is not None:
                taken.append(Export(kind, name, number))
                self._leaving[kind, name] = offered_bytes
                size_bytes += offered_bytes
        return tuple(sorted(taken, key=lambda export: export.kind))

    def store(self, exports: Sequence[Export], payloads: Sequence[bytes | Staged]) -> None:
        """The bytes of what was taken, in order; what was forgotten meanwhile is not kept."""
        for export, payload in zip(exports, payloads, strict=True):
            if self._leaving.pop((export.kind, export.name), None) is not None:
                self._tier.save(export.name, payload, kind=export.kind)

    # ---- in ----

    def has_page(self, name: bytes) -> bool:
        """Whether a page is on disk."""
        return self._tier.has(name, kind=Kind.PAGE)

    def has_checkpoint(self, name: bytes) -> bool:
        """Whether the state behind a page is on disk."""
        return self._tier.has(name, kind=Kind.CHECKPOINT)

    @property
    def is_stalled(self) -> bool:
        """Whether the disk gave nothing when it was asked last; then nobody should wait for it for a while."""
        return time.monotonic() < self._asked_again_at

    def read(self, seq_id: str, names: Sequence[bytes], checkpoint: bytes | None) -> None:
        """Begin to load pages, and a checkpoint, for a sequence."""
        if not self._loads:
            self._answered_at = time.monotonic()
        loads = [_Load(self._tier.load(names), Kind.PAGE)] if names else []
        if checkpoint is not None:
            loads.append(_Load(self._tier.load([checkpoint], kind=Kind.CHECKPOINT), Kind.CHECKPOINT))
        self._loads[seq_id] = loads

    def is_reading(self, seq_id: str) -> bool:
        """Whether a load of the sequence is under way."""
        return seq_id in self._loads

    def take(self, seq_id: str) -> list[tuple[Kind, bytes, bytes]]:
        """What has come since the last call: kind, name, payload; a page only if all before it came.

        The sequence reads no more once all has come, or if the disk gives nothing to anybody for too long.
        """
        came: list[tuple[Kind, bytes, bytes]] = []
        left: list[_Load] = []
        for load in self._loads[seq_id]:
            loaded = self._tier.take_loaded(load.ticket)
            came += [(load.kind, name, payload) for name, payload in loaded.blobs.items()]
            if loaded.missing:
                self._tier.cancel(load.ticket)  # pages behind a gap are of no use
            elif not loaded.is_done:
                left.append(load)
        self._loads[seq_id] = left
        if not left or (not came and self._has_stalled()):
            self.cancel(seq_id)
        return came

    def _has_stalled(self) -> bool:
        """Note whether the disk goes on; if it has not for too long, ask it no more for a while."""
        now, num_answered = time.monotonic(), self._tier.num_answered
        if num_answered != self._num_answered:
            self._num_answered, self._answered_at = num_answered, now
        if now - self._answered_at < STALL_S:
            return False
        if not self.is_stalled:
            log.warning("The cache on disk does not answer; prefixes are computed instead")
        self._asked_again_at = now + STALL_PAUSE_S
        return True

    def cancel(self, seq_id: str) -> None:
        """The sequence waits no more; one that does not is ignored."""
        for load in self._loads.pop(seq_id, ()):
            self._tier.cancel(load.ticket)

    def forget(self) -> int:
        """Delete all that this model has on disk; returns how many blobs."""
        self._wanted.clear()
        self._leaving.clear()
        for seq_id in list(self._loads):
            self.cancel(seq_id)
        return self._tier.forget()


def open_disk(config: Config, info: RunnerInfo) -> DiskCache | None:
    """The cache on disk, looked through, if the settings ask for one and the runner can name its model.

    A disk that could be used when the server started may have gone before its engine starts again: then there is a
    warning, and no cache on disk.
    """
    if not info.fingerprint or not config.prefix_cache:
        return None
    try:
        tier = open_tier(config, info.fingerprint)
    except ConfigError as error:
        log.warning(f"nothing is kept on disk: {error.message}")
        return None
    if tier is None:
        return None
    tier.flush(SCAN_TIMEOUT_S)  # the first request after a restart is to find what there is
    return DiskCache(tier, page_bytes=info.cache.page_bytes)
