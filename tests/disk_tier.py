"""A tier whose loads can be waited for, and a clock that stands still."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from vllm_mlx.kv.tiers.record import Kind
from vllm_mlx.kv.tiers.ssd import SsdTier

MODEL = b"model-fingerprnt"
TIMEOUT_S = 30.0


class Clock:
    """Seconds since 1970 that pass when a test says so."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Tier(SsdTier):
    """A tier whose loads can be waited for."""

    def read(self, *names: bytes, kind: Kind = Kind.PAGE) -> dict[bytes, bytes]:
        """Load blobs; the missing ones are left out."""
        ticket, found, deadline = self.load(names, kind=kind), {}, time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            loaded = self.take_loaded(ticket)
            found |= loaded.blobs
            if loaded.is_done:
                return found
            time.sleep(0.001)
        raise AssertionError("the tier did not answer")

    def keep(self, blobs: dict[bytes, bytes], *, kind: Kind = Kind.PAGE) -> None:
        """Save blobs and wait until they are on disk."""
        taken = [self.save(name, payload, kind=kind) for name, payload in blobs.items()]
        assert all(taken)
        assert self.flush(TIMEOUT_S)


MakeTier = Callable[..., Tier]


def named(text: str) -> bytes:
    """A name of 16 bytes."""
    return text.encode().ljust(16, b".")


def blob_files(folder: Path) -> list[Path]:
    """Every file of a blob."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".page", ".state"))


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something that the tier's thread does."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)
