"""The SSD tier: blobs by name, kept on disk over restarts. Every call returns at once; a thread does the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError
from vllm_mlx.core.step import Staged
from vllm_mlx.kv.tiers.folder import BlobFolder, model_folder
from vllm_mlx.kv.tiers.governor import DailyBudget, WriteSwitch
from vllm_mlx.kv.tiers.index import Index
from vllm_mlx.kv.tiers.queues import Loaded, LoadQueue, Save, SaveQueue, Ticket
from vllm_mlx.kv.tiers.record import NAME_BYTES, Kind, stored_size
from vllm_mlx.kv.tiers.sealing import Sealer, read_key
from vllm_mlx.kv.tiers.state import Refusal, TierState, TierStats
from vllm_mlx.kv.tiers.worker import DiskWorker

GB = 1_000_000_000
_MAX_QUEUED_BYTES = 512 << 20
_MAX_AHEAD_BYTES = 256 << 20
_SCAN_INTERVAL_S = 300.0
_CLOSE_TIMEOUT_S = 5.0


def _nobody() -> None:
    pass


class SsdTier:
    """Keeps blobs in `folder`, at most `max_bytes` of all models together, and gives back exact bytes or nothing.

    `fingerprint` is 16 bytes of everything that the meaning of a payload depends on. `daily_write_bytes` bounds what is
    written in a day, `min_free_bytes` stays free on the disk, and `key` (32 bytes) encrypts. `on_loaded` is called on
    the tier's thread when there may be something for `take_loaded`; it must return at once and not raise. Memory is
    bounded by `max_queued_bytes` for what waits to be written and `max_ahead_bytes` for what is read ahead.

    Several tiers may share a folder, in one process or many: they see what the others wrote at their next scan. No
    method waits for the disk, but for `flush` and `close`; none raises because of the disk. Raises ConfigError if the
    key is wrong or `cryptography` is missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: bytes,
        max_bytes: int,
        daily_write_bytes: int | None,
        min_free_bytes: int,
        key: bytes | None = None,
        clock: Callable[[], float] = time.time,
        on_loaded: Callable[[], None] = _nobody,
        max_queued_bytes: int = _MAX_QUEUED_BYTES,
        max_ahead_bytes: int = _MAX_AHEAD_BYTES,
        scan_interval_s: float = _SCAN_INTERVAL_S,
    ) -> None:
        _require_name(fingerprint)
        sealer = Sealer(key) if key is not None else None
        model = model_folder(fingerprint, key)
        self._folder = BlobFolder(folder, model=model, clock=clock)
        self._is_sealed = sealer is not None
        self._state = TierState(
            index=Index(f"{model}/"),
            saves=SaveQueue(max_queued_bytes),
            loads=LoadQueue(max_ahead_bytes),
            budget=DailyBudget(folder / "written.json", max_bytes=daily_write_bytes, clock=clock),
            switch=WriteSwitch(clock=clock),
            max_bytes=max_bytes,
        )
        self._worker = DiskWorker(
            self._state,
            self._folder,
            fingerprint=fingerprint,
            sealer=sealer,
            min_free_bytes=min_free_bytes,
            scan_interval_s=scan_interval_s,
            clock=clock,
            on_loaded=on_loaded,
        )
        self._worker.start()

    @property
    def is_ready(self) -> bool:
        """Whether the folder has been looked through; until then some blobs are not known yet."""
        return self._state.is_ready

    def has(self, name: bytes, *, kind: Kind = Kind.PAGE) -> bool:
        """Whether a blob is on disk, as far as is known; not while it is only queued. From any thread."""
        return self._state.index.has(self._folder.path(kind, name))

    def wants(self, name: bytes, size_bytes: int, *, kind: Kind = Kind.PAGE) -> bool:
        """Whether `save` would take a payload of that size now; a no is counted as a refusal."""
        with self._state.lock:
            return self._accepts(self._folder.path(kind, name), size_bytes)

    def save(self, name: bytes, payload: bytes | memoryview | Staged, *, kind: Kind = Kind.PAGE) -> bool:
        """Queue a blob to be written; False if it is refused, see `TierStats.num_refused`.

        The payload is not copied here: it must not change until it is written. What is staged is taken on the tier's
        thread, before anything else is written. A blob that was queued may still be given up.
        """
        _require_name(name)
        path = self._folder.path(kind, name)
        view = memoryview(payload).cast("B") if isinstance(payload, bytes | memoryview) else payload
        with self._state.lock:
            if not self._accepts(path, view.nbytes):
                return False
            self._state.saves.add(Save(path, kind, name, view))
            self._state.lock.notify_all()
        return True

    def load(self, names: Sequence[bytes], *, kind: Kind = Kind.PAGE) -> Ticket:
        """Read blobs ahead, in this order; they come piece by piece from `take_loaded`."""
        with self._state.lock:
            ticket = self._state.loads.add(names, kind)
            if self._state.has_ended or self._state.is_closing or self._state.must_forget:
                self._state.loads.void()
            self._state.lock.notify_all()
        return ticket

    def take_loaded(self, ticket: Ticket) -> Loaded:
        """What was read since the last call. Reading pauses while much was read and not taken: take it soon."""
        with self._state.lock:
            loaded = self._state.loads.take(ticket)
            self._state.lock.notify_all()
        return loaded

    @property
    def num_answered(self) -> int:
        """Blobs that were read or missed since the tier was opened: while it stands still, the disk gives nothing."""
        with self._state.lock:
            return self._state.counts.num_hits + self._state.counts.num_misses

    def cancel(self, ticket: Ticket) -> None:
        """Read no more for a ticket; one that is done or unknown is ignored."""
        with self._state.lock:
            self._state.loads.cancel(ticket)
            self._state.lock.notify_all()

    def touch(self, names: Sequence[bytes], *, kind: Kind = Kind.PAGE) -> None:
        """Count blobs as used, without loading them. In a sequence's order: its end will be deleted first."""
        with self._state.lock:
            if not self._state.has_ended:
                self._state.used.extend(self._folder.path(kind, name) for name in reversed(names))
                self._state.lock.notify_all()

    def forget(self) -> int:
        """Delete every blob of this model and key, queued ones too; returns how many were known on disk.

        From now on none of them is known or loaded; the files go in the background. Other models keep theirs.
        """
        with self._state.lock:
            self._state.num_forgets += 1
            self._state.must_forget = not self._state.has_ended
            self._state.counts.refused[Refusal.FORGOTTEN] += self._state.saves.clear()
            self._state.loads.void()
            self._state.lock.notify_all()
            return self._state.index.forget_own()

    def stats(self) -> TierStats:
        """The figures now."""
        with self._state.lock:
            return self._state.stats()

    def flush(self, timeout_s: float) -> bool:
        """Wait until what is queued is written or given up, and what was forgotten is deleted; False if it is not."""
        with self._state.lock:
            return self._state.lock.wait_for(
                lambda: self._state.has_ended or (self._state.is_ready and self._state.is_idle), timeout_s
            )

    def close(self) -> None:
        """Give up what is queued (see `flush`) and end the thread. It waits seconds at most for a disk that hangs."""
        with self._state.lock:
            self._state.is_closing = True
            self._state.lock.notify_all()
        self._worker.join(_CLOSE_TIMEOUT_S)

    def _accepts(self, path: str, size_bytes: int) -> bool:
        refusal = self._state.refusal(path, stored_size(size_bytes, sealed=self._is_sealed))
        if refusal is not None:
            self._state.counts.refused[refusal] += 1
        return refusal is None


def check_settings(config: Config) -> None:
    """Raise ConfigError if the folder or the key file of the settings cannot be used."""
    if config.ssd_cache_dir is not None:
        _folder(config.ssd_cache_dir)
        _key(config)


def open_tier(config: Config, fingerprint: bytes, *, on_loaded: Callable[[], None] = _nobody) -> SsdTier | None:
    """The tier that the settings ask for, or None. Raises ConfigError if its folder or key file cannot be used."""
    if config.ssd_cache_dir is None:
        return None
    return SsdTier(
        _folder(config.ssd_cache_dir),
        fingerprint=fingerprint,
        max_bytes=int(config.ssd_cache_max_gb * GB),
        daily_write_bytes=int(config.ssd_cache_daily_write_gb * GB) or None,
        min_free_bytes=int(config.ssd_cache_min_free_gb * GB),
        key=_key(config),
        on_loaded=on_loaded,
    )


def _folder(path: str) -> Path:
    folder = Path(path).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(f"--ssd-cache-dir: {folder} is not a folder that can be used: {error.strerror}.") from error
    except OSError:
        pass  # a disk that is full or gone for now: the tier says so, and goes on when it is back
    return folder


def _key(config: Config) -> bytes | None:
    return read_key(Path(config.ssd_cache_key_file).expanduser()) if config.ssd_cache_key_file else None


def _require_name(name: bytes) -> None:
    if len(name) != NAME_BYTES:
        raise ValueError(f"names and fingerprints have {NAME_BYTES} bytes, not {len(name)}")
