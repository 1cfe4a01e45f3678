"""The thread of a tier: the only one that touches the disk. Whatever fails becomes a miss, a count and a warning."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from vllm_mlx.core.log import fields, get_logger
from vllm_mlx.core.step import Staged
from vllm_mlx.kv.tiers.folder import BlobFolder, FoundFile
from vllm_mlx.kv.tiers.queues import Read, Save
from vllm_mlx.kv.tiers.record import (
    CorruptRecordError,
    ForeignRecordError,
    Identity,
    decode,
    encode,
    stored_size,
)
from vllm_mlx.kv.tiers.sealing import Sealer
from vllm_mlx.kv.tiers.state import Refusal, TierState

log = get_logger("kv")

Work = Callable[[], None]
_WARNING_INTERVAL_S = 60.0
_DATE_STEP_NS = 1_000
"""Between the dates of blobs that were used together, so that their order survives a restart."""


class DiskWorker(threading.Thread):
    """Does what `TierState` asks for. The urgent first: forget, read, look through the folder, write, look again."""

    def __init__(
        self,
        state: TierState,
        folder: BlobFolder,
        *,
        fingerprint: bytes,
        sealer: Sealer | None,
        min_free_bytes: int,
        scan_interval_s: float,
        clock: Callable[[], float],
        on_loaded: Callable[[], None],
    ) -> None:
        super().__init__(name="ssd-tier", daemon=True)
        self._state = state
        self._folder = folder
        self._fingerprint = fingerprint
        self._sealer = sealer
        self._min_free_bytes = min_free_bytes
        self._scan_interval_s = scan_interval_s
        self._clock = clock
        self._on_loaded = on_loaded
        self._scan: Iterator[list[FoundFile]] | None = None
        self._scan_due = 0.0
        self._forget_due = 0.0
        self._warned: dict[str, float] = {}

    def run(self) -> None:
        """Work until the tier closes. If this ends for any other reason, the tier ends with it: nobody waits for it."""
        try:
            while (work := self._wait_for_work()) is not None:
                work()
            self._state.budget.persist()
        finally:
            with self._state.lock:
                self._state.end()
                self._state.lock.notify_all()
            self._on_loaded()

    def _wait_for_work(self) -> Work | None:
        with self._state.lock:
            while not self._state.is_closing:
                if self._state.is_idle:
                    self._state.lock.notify_all()  # whoever flushes waits for this
                if (work := self._urgent() or self._background()) is not None:
                    return work
                self._state.lock.wait(max(0.0, self._scan_due - time.monotonic()))
        return None

    def _urgent(self) -> Work | None:
        """What somebody waits for."""
        if self._state.must_forget and time.monotonic() >= self._forget_due:
            return self._forget
        read = self._state.loads.start()
        return partial(self._read, read) if read else None

    def _background(self) -> Work | None:
        """What nobody waits for. What is known comes before what is written, so that nothing is written twice.

        First of all what is staged: it holds memory of the device.
        """
        state = self._state
        if staged := state.saves.next_staged():
            return partial(self._take, *staged)
        if self._scan is None and time.monotonic() >= self._scan_due:
            return self._begin_scan
        if self._scan is not None and not state.is_ready:
            return self._go_on_scanning
        if state.used:
            paths = list(state.used)
            state.used.clear()
            return partial(self._use, paths)
        if save := state.saves.start():
            return partial(self._save, save)
        return self._go_on_scanning if self._scan is not None else None

    # ---- reading ----

    def _read(self, read: Read) -> None:
        path = self._folder.path(read.kind, read.name)
        num_forgets = self._state.num_forgets
        payload = self._payload(path, Identity(read.kind, self._fingerprint, read.name))
        with self._state.lock:
            if self._state.num_forgets != num_forgets:
                payload = None
            if payload is None:
                self._state.counts.num_misses += 1
            else:
                self._state.counts.num_hits += 1
                self._state.counts.bytes_read += len(payload)
            found = self._state.loads.deliver(read, payload)
            # The end of a sequence is of no use without its beginning: it is the first to be deleted
            self._state.used.extend(self._folder.path(read.kind, name) for name in reversed(found))
        self._on_loaded()

    def _payload(self, path: str, identity: Identity) -> bytes | None:
        """What was saved under that identity, or None."""
        try:
            header, stored = self._folder.read(path, max_bytes=self._max_stored_bytes())
            return decode(header, stored, identity, sealer=self._sealer)
        except FileNotFoundError:
            self._drop(path)
        except CorruptRecordError as error:
            self._discard(path, reason=str(error))
        except ForeignRecordError as error:
            self._warn("foreign", "A file in the cache on disk is not ours to read", file=path, reason=str(error))
            with self._state.lock:
                self._state.index.mark_unreadable(path)
        except (OSError, MemoryError) as error:
            self._warn("read", "A file in the cache on disk could not be read", file=path, reason=str(error))
            self._drop(path)
        return None

    def _max_stored_bytes(self) -> int:
        return stored_size(self._state.saves.max_bytes, sealed=True)

    def _discard(self, path: str, *, reason: str) -> None:
        """Delete a corrupt file."""
        self._warn("corrupt", "A corrupt file in the cache on disk is deleted", file=path, reason=reason)
        with self._state.lock:
            self._state.counts.num_corrupt += 1
            self._state.index.mark_unreadable(path)
        try:
            self._folder.delete(path)
        except OSError as error:
            self._warn("delete", "A corrupt file could not be deleted", file=path, reason=str(error))
            return
        self._drop(path)

    def _drop(self, path: str) -> None:
        with self._state.lock:
            self._state.index.drop(path)

    def _use(self, paths: Iterable[str]) -> None:
        """Count files as used, the last one last."""
        now_ns = int(self._clock() * 1e9)
        for position, path in enumerate(paths):
            at_ns = now_ns + position * _DATE_STEP_NS
            with self._state.lock:
                is_stale = self._state.index.use(path, at_ns)
            if is_stale:
                self._folder.set_date(path, at_ns)

    # ---- writing ----

    def _take(self, save: Save, staged: Staged) -> None:
        """Copy what is staged."""
        try:
            payload = staged.take()
        except MemoryError as error:
            self._warn("memory", "There is too little memory to write to the cache on disk", reason=str(error))
            payload = None
        with self._state.lock:
            self._state.saves.settle(save, payload)
            if payload is None:
                self._state.counts.refused[Refusal.WRITE_FAILED] += 1

    def _save(self, save: Save) -> None:
        num_forgets = self._state.num_forgets
        refusal = self._refusal(save) or self._written(save, num_forgets=num_forgets)
        with self._state.lock:
            self._state.saves.finish()
            if refusal is not None:
                self._state.counts.refused[refusal] += 1

    def _refusal(self, save: Save) -> Refusal | None:
        """Why a blob that was queued may not be written any more."""
        if not self._state.switch.is_on:
            return Refusal.PAUSED
        if self._state.index.has(save.path):
            return Refusal.KNOWN
        if not self._state.budget.allows(self._stored_size(save)):
            return Refusal.DAILY_BUDGET
        return None

    def _written(self, save: Save, *, num_forgets: int) -> Refusal | None:
        """Write a blob."""
        size_bytes = self._stored_size(save)
        assert isinstance(save.payload, memoryview), "what is staged is taken before anything is written"
        try:
            self._folder.prepare(save.path)
            if self._folder.free_bytes() - size_bytes < self._min_free_bytes:
                self._pause(f"the disk is full, but for the {self._min_free_bytes / 1e9:g} GB that are left to others")
                return Refusal.LOW_SPACE
            self._make_room(size_bytes)
            self._state.budget.spend(size_bytes)
            identity = Identity(save.kind, self._fingerprint, save.name)
            dated_ns = self._folder.write(save.path, encode(save.payload, identity, sealer=self._sealer))
        except (OSError, MemoryError) as error:
            self._pause(str(error) or type(error).__name__)
            return Refusal.WRITE_FAILED
        if self._state.switch.succeed():
            log.info("Writing to the cache on disk works again")
        with self._state.lock:
            if self._state.num_forgets != num_forgets:
                return Refusal.FORGOTTEN
            self._state.index.add(save.path, size_bytes=size_bytes, dated_ns=dated_ns)
            self._state.counts.num_saved += 1
            self._state.counts.bytes_written += size_bytes
        return None

    def _stored_size(self, save: Save) -> int:
        return stored_size(save.payload.nbytes, sealed=self._sealer is not None)

    def _make_room(self, size_bytes: int) -> None:
        """Delete what was used longest ago until `size_bytes` more fit. Raises OSError."""
        index = self._state.index
        while index.size_bytes + size_bytes > self._state.max_bytes and (oldest := index.oldest()) is not None:
            self._folder.delete(oldest)
            with self._state.lock:
                index.drop(oldest)
                self._state.counts.num_evicted += 1

    def _pause(self, problem: str) -> None:
        """Stop writing for a while."""
        wait_s = self._state.switch.fail(problem)
        log.warning("Writing to the cache on disk pauses", extra=fields(reason=problem, seconds=round(wait_s)))

    # ---- the folder as a whole ----

    def _begin_scan(self) -> None:
        self._scan = self._folder.scan()
        self._scan_due = time.monotonic() + self._scan_interval_s
        with self._state.lock:
            self._state.index.begin_scan()

    def _go_on_scanning(self) -> None:
        """Look through one more sub-folder."""
        assert self._scan is not None
        try:
            found = next(self._scan, None)
        except OSError as error:
            self._warn("scan", "The cache on disk cannot be looked through", reason=str(error))
            found = None
        if found is None:
            self._end_scan()
            return
        with self._state.lock:
            for file in found:
                if not (self._state.must_forget and self._folder.is_own(file.path)):
                    self._state.index.add(file.path, size_bytes=file.size_bytes, dated_ns=file.dated_ns)

    def _end_scan(self) -> None:
        self._scan = None
        with self._state.lock:
            self._state.index.end_scan()
            self._state.is_ready = True
        self._state.budget.persist()
        try:
            self._make_room(0)
        except OSError as error:
            self._warn("delete", "The cache on disk is too large and cannot be made smaller", reason=str(error))

    def _forget(self) -> None:
        """Delete this model's files; if the disk refuses, try again at the next scan, and load none meanwhile."""
        try:
            self._folder.discard_model()
        except OSError as error:
            self._forget_due = self._scan_due
            self._warn("forget", "The cache on disk could not be emptied; tried again later", reason=str(error))
            return
        with self._state.lock:
            self._state.index.forget_own()
            self._state.must_forget = False

    def _warn(self, topic: str, message: str, **values: object) -> None:
        """Log a warning, at most one a minute of each topic."""
        now = time.monotonic()
        if now - self._warned.get(topic, -_WARNING_INTERVAL_S) >= _WARNING_INTERVAL_S:
            self._warned[topic] = now
            log.warning(message, extra=fields(**values))
