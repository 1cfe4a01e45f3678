"""Blobs whose bytes lie where they were computed until the tier's thread takes them."""

from __future__ import annotations

import threading

import pytest
from disk_tier import TIMEOUT_S, MakeTier, named

from vllm_mlx.kv.tiers.folder import BlobFolder
from vllm_mlx.kv.tiers.queues import Save, SaveQueue
from vllm_mlx.kv.tiers.record import Kind
from vllm_mlx.testing.held import StagedBytes

A, B, C = (named(letter) for letter in "abc")


class Watched:
    """Staged bytes that tell when they are taken, and wait to be allowed to."""

    def __init__(self, payload: bytes, *, log: list[str], may_go: threading.Event | None = None) -> None:
        self._payload = payload
        self._log = log
        self._may_go = may_go
        self.reached = threading.Event()

    @property
    def nbytes(self) -> int:
        return len(self._payload)

    def take(self) -> memoryview:
        self._log.append(threading.current_thread().name)
        self.reached.set()
        assert self._may_go is None or self._may_go.wait(TIMEOUT_S)
        return memoryview(self._payload)


def test_staged_blob_is_taken_once_on_the_tiers_thread_and_loaded_exactly(make_tier: MakeTier) -> None:
    tier, log = make_tier(), list[str]()
    assert tier.save(A, Watched(b"one", log=log))
    assert tier.flush(TIMEOUT_S)
    assert tier.read(A) == {A: b"one"}
    assert log == ["ssd-tier"]


def test_what_is_staged_is_taken_before_anything_else_is_written(
    make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, log, may_go = make_tier(), list[str](), threading.Event()
    real = BlobFolder.write
    monkeypatch.setattr(BlobFolder, "write", lambda *a: (log.append("write"), real(*a))[1])
    first = Watched(b"one", log=log, may_go=may_go)
    tier.save(A, first)
    assert first.reached.wait(TIMEOUT_S)
    tier.save(B, b"two")
    tier.save(C, Watched(b"three", log=log))
    assert tier.stats().queued_bytes == 11
    may_go.set()
    assert tier.flush(TIMEOUT_S)
    assert log == ["ssd-tier", "ssd-tier", "write", "write", "write"]
    assert tier.read(A, B, C) == {A: b"one", B: b"two", C: b"three"}
    assert tier.stats().queued_bytes == 0


def test_what_is_forgotten_while_it_is_taken_is_not_written(make_tier: MakeTier) -> None:
    tier, may_go = make_tier(), threading.Event()
    blob = Watched(b"one", log=[], may_go=may_go)
    tier.save(A, blob)
    assert blob.reached.wait(TIMEOUT_S)
    tier.forget()
    may_go.set()
    assert tier.flush(TIMEOUT_S)
    assert (tier.has(A), tier.stats().queued_bytes) == (False, 0)


def test_a_blob_for_which_there_is_no_memory_is_given_up_and_others_are_written(
    make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make_tier()

    def fail(blob: StagedBytes) -> memoryview:
        raise MemoryError("none left")

    monkeypatch.setattr(StagedBytes, "take", fail)
    tier.save(A, StagedBytes(b"one"))
    tier.save(B, b"two")
    assert tier.flush(TIMEOUT_S)
    assert (tier.has(A), tier.has(B), tier.stats().queued_bytes) == (False, True, 0)
    assert tier.stats().num_refused == {"write_failed": 1}


def test_staged_blobs_count_by_their_size_while_they_are_queued() -> None:
    queue = SaveQueue(100)
    save = Save("x", Kind.PAGE, A, StagedBytes(bytes(30)))
    queue.add(save)
    found = queue.next_staged()
    assert found is not None
    assert queue.next_staged() is None
    queue.settle(save, found[1].take())
    assert queue.size_bytes == 30
    queue.settle(save, None)  # of no effect: it is settled
    assert queue.size_bytes == 30
    assert queue.start() is not None
    queue.finish()
    assert queue.size_bytes == 0
