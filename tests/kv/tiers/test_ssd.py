"""The tier as its callers see it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from disk_tier import TIMEOUT_S, Clock, MakeTier, blob_files, named, wait_until

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError
from vllm_mlx.kv.tiers.folder import BlobFolder
from vllm_mlx.kv.tiers.record import HEADER_BYTES, Kind
from vllm_mlx.kv.tiers.ssd import open_tier

A, B, C, D = (named(letter) for letter in "abcd")
KEY = bytes(range(32))


class Gate:
    """Holds up the tier's thread at every read or write, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        real = getattr(BlobFolder, method)

        def held(folder: BlobFolder, *args: Any, **keywords: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(TIMEOUT_S)
            return real(folder, *args, **keywords)

        monkeypatch.setattr(BlobFolder, method, held)


# ---- keeping and giving back ----


def test_saved_blob_is_loaded_exactly(make_tier: MakeTier) -> None:
    tier = make_tier()
    tier.keep({A: b"one", B: b""})
    assert tier.read(A, C, B) == {A: b"one", B: b""}
    stats = tier.stats()
    assert (stats.num_hits, stats.num_misses, stats.bytes_read) == (2, 1, 3)
    assert (stats.num_blobs, stats.size_bytes) == (2, 2 * HEADER_BYTES + 3)
    assert stats.bytes_written == stats.folder_bytes == stats.size_bytes


def test_memory_view_of_any_shape_is_saved(make_tier: MakeTier) -> None:
    tier = make_tier()
    assert tier.save(A, memoryview(b"abcdefgh").cast("I"))
    assert tier.flush(TIMEOUT_S)
    assert tier.read(A) == {A: b"abcdefgh"}


def test_page_and_checkpoint_of_one_name_are_two_blobs(make_tier: MakeTier) -> None:
    tier = make_tier()
    tier.keep({A: b"page"})
    assert not tier.has(A, kind=Kind.CHECKPOINT)
    tier.keep({A: b"state"}, kind=Kind.CHECKPOINT)
    assert tier.read(A) == {A: b"page"}
    assert tier.read(A, kind=Kind.CHECKPOINT) == {A: b"state"}


def test_blobs_survive_a_restart(make_tier: MakeTier) -> None:
    first = make_tier()
    first.keep({A: b"one", B: b"two"})
    first.close()
    second = make_tier()
    assert second.has(A)
    assert second.read(A, B) == {A: b"one", B: b"two"}


def test_queued_blob_is_not_there_yet(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "write")
    tier = make_tier()
    assert tier.save(A, b"one")
    gate.reached.wait(TIMEOUT_S)
    assert not tier.has(A)
    assert not tier.flush(0.01)
    gate.opened.set()
    assert tier.flush(TIMEOUT_S)
    assert tier.has(A)


def test_known_blob_is_not_written_twice(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "write")
    tier = make_tier()
    assert tier.save(A, b"one")
    assert not tier.save(A, b"one")
    gate.opened.set()
    assert tier.flush(TIMEOUT_S)
    assert not tier.save(A, b"one")
    assert not tier.wants(A, 3)
    assert tier.stats().num_refused == {"known": 3}


def test_files_are_for_their_owner_only(make_tier: MakeTier, folder: Path) -> None:
    make_tier().keep({A: b"one"})
    (file,) = blob_files(folder)
    assert file.stat().st_mode & 0o077 == 0
    assert all(parent.stat().st_mode & 0o077 == 0 for parent in list(file.parents)[:3])


def test_wrong_name_is_refused_loudly(make_tier: MakeTier) -> None:
    with pytest.raises(ValueError, match="16 bytes, not 5"):
        make_tier().save(b"short", b"")


# ---- reading ahead ----


def test_reads_go_before_writes(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make_tier()
    tier.keep({A: b"one"})
    gate = Gate(monkeypatch, "write")
    order: list[str] = []
    real_read = BlobFolder.read
    monkeypatch.setattr(BlobFolder, "read", lambda *a, **k: (order.append("read"), real_read(*a, **k))[1])
    held = BlobFolder.write
    monkeypatch.setattr(BlobFolder, "write", lambda *a, **k: (order.append("write"), held(*a, **k))[1])
    tier.save(B, b"two")
    tier.save(C, b"three")
    gate.reached.wait(TIMEOUT_S)
    ticket = tier.load([A])
    gate.opened.set()
    assert tier.flush(TIMEOUT_S)
    assert order == ["write", "read", "write"]
    assert tier.take_loaded(ticket).blobs == {A: b"one"}


def test_caller_is_told_when_something_was_read(make_tier: MakeTier) -> None:
    told = threading.Event()
    tier = make_tier(on_loaded=told.set)
    tier.keep({A: b"one"})
    assert not told.is_set()
    ticket = tier.load([A])
    assert told.wait(TIMEOUT_S)
    assert tier.take_loaded(ticket).blobs == {A: b"one"}


def test_cancelled_ticket_brings_nothing(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make_tier()
    tier.keep({A: b"one", B: b"two"})
    gate = Gate(monkeypatch, "read")
    ticket = tier.load([A, B])
    gate.reached.wait(TIMEOUT_S)
    tier.cancel(ticket)
    gate.opened.set()
    assert tier.read(B) == {B: b"two"}
    loaded = tier.take_loaded(ticket)
    assert (loaded.blobs, loaded.is_done) == ({}, True)


def test_reading_ahead_is_bounded(make_tier: MakeTier) -> None:
    tier = make_tier(max_ahead_bytes=250)
    blobs = {named(str(number)): bytes([number]) * 100 for number in range(8)}
    tier.keep(blobs)
    ticket = tier.load(list(blobs))
    wait_until(lambda: tier.stats().num_hits == 3)
    assert tier.flush(TIMEOUT_S)
    assert (tier.stats().num_hits, tier.stats().ahead_bytes) == (3, 300)
    tier.cancel(ticket)
    assert tier.stats().ahead_bytes == 0
    assert tier.read(*blobs) == blobs


# ---- what is refused ----


def test_full_queue_refuses(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "write")
    tier = make_tier(max_queued_bytes=1000)
    taken = [tier.save(named(str(number)), bytes(300)) for number in range(5)]
    gate.opened.set()
    assert taken == [True, True, True, False, False]
    assert tier.stats().num_refused == {"queue_full": 2}


def test_blob_that_can_never_fit_is_refused(make_tier: MakeTier) -> None:
    tier = make_tier(max_bytes=HEADER_BYTES + 99)
    assert not tier.save(A, bytes(100))
    assert tier.save(B, bytes(99))
    assert tier.stats().num_refused == {"too_large": 1}


def test_daily_budget_bounds_writing_over_a_restart_and_a_midnight(make_tier: MakeTier) -> None:
    clock = Clock(20_000 * 86_400.0 + 3600)
    first = make_tier(clock=clock, daily_write_bytes=3 * (HEADER_BYTES + 100))
    first.keep({A: bytes(100), B: bytes(100)})
    first.close()
    second = make_tier(clock=clock, daily_write_bytes=3 * (HEADER_BYTES + 100))
    second.keep({C: bytes(100)})
    assert not second.save(D, bytes(100))
    assert second.stats().num_refused == {"daily_budget": 1}
    clock.now += 86_400
    second.keep({D: bytes(100)})


def test_space_of_others_is_left_to_them(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    tier = make_tier(clock=clock, min_free_bytes=1_000_000)
    monkeypatch.setattr(BlobFolder, "free_bytes", lambda self: 1_000_050)
    assert tier.save(A, b"one")
    assert tier.flush(TIMEOUT_S)
    assert not tier.save(B, b"two")
    stats = tier.stats()
    assert (stats.num_refused, stats.is_writable) == ({"low_space": 1, "paused": 1}, False)
    assert stats.problem == "the disk is full, but for the 0.001 GB that are left to others"
    monkeypatch.setattr(BlobFolder, "free_bytes", lambda self: 2_000_000)
    clock.now += 5
    tier.keep({A: b"one"})
    assert tier.stats().problem is None


# ---- what is deleted ----


def file_size(payload: bytes) -> int:
    return HEADER_BYTES + len(payload)


def test_what_was_used_longest_ago_is_deleted_first(make_tier: MakeTier, folder: Path) -> None:
    tier = make_tier(max_bytes=3 * file_size(b"12345"))
    for name in (A, B, C):
        tier.keep({name: b"12345"})
    assert tier.read(A) == {A: b"12345"}
    tier.touch([B])
    assert tier.flush(TIMEOUT_S)
    tier.keep({D: b"12345"})
    assert [tier.has(name) for name in (A, B, C, D)] == [True, True, False, True]
    assert tier.stats().num_evicted == 1
    assert sum(file.stat().st_size for file in blob_files(folder)) == 3 * file_size(b"12345")


def test_end_of_a_sequence_is_deleted_before_its_beginning(make_tier: MakeTier) -> None:
    tier = make_tier(max_bytes=3 * file_size(b"12345"))
    tier.keep({A: b"12345", B: b"12345", C: b"12345"})
    assert set(tier.read(A, B, C)) == {A, B, C}
    tier.keep({D: b"12345"})
    assert [tier.has(name) for name in (A, B, C)] == [True, True, False]


def test_order_of_use_survives_a_restart(make_tier: MakeTier) -> None:
    clock = Clock()
    first = make_tier(clock=clock)
    for name in (A, B, C):
        first.keep({name: b"12345"})
        clock.now += 1
    clock.now += 3600
    first.read(A)
    assert first.flush(TIMEOUT_S)
    first.close()
    second = make_tier(clock=clock, max_bytes=3 * file_size(b"12345"))
    second.keep({D: b"12345"})
    assert [second.has(name) for name in (A, B, C, D)] == [True, False, True, True]


def test_smaller_limit_shrinks_the_folder(make_tier: MakeTier, folder: Path) -> None:
    clock = Clock()
    first = make_tier(clock=clock)
    for name in (A, B, C):
        first.keep({name: b"12345"})
        clock.now += 1
    first.close()
    tier = make_tier(max_bytes=file_size(b"12345"), is_ready=False)
    wait_until(lambda: tier.stats().num_evicted == 2)
    assert tier.read(A, B, C) == {C: b"12345"}


def test_limit_counts_every_model(make_tier: MakeTier) -> None:
    other = make_tier(fingerprint=b"another model...", clock=Clock(1_000.0))
    other.keep({A: b"12345", B: b"12345"})
    tier = make_tier(max_bytes=2 * file_size(b"12345"))
    tier.keep({C: b"12345"})
    assert tier.stats().folder_bytes == 2 * file_size(b"12345")
    assert tier.stats().size_bytes == file_size(b"12345")
    assert len(other.read(A, B)) == 1


def test_forgotten_blobs_are_gone_from_disk_and_queue(
    make_tier: MakeTier, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_tier(fingerprint=b"another model...")
    other.keep({A: b"theirs"})
    tier = make_tier()
    tier.keep({A: b"one", B: b"two"})
    gate = Gate(monkeypatch, "write")
    tier.save(C, b"being written")
    tier.save(D, b"queued")
    gate.reached.wait(TIMEOUT_S)
    ticket = tier.load([A])
    assert tier.forget() == 2
    assert not tier.has(A)
    gate.opened.set()
    assert tier.flush(TIMEOUT_S)
    assert [file.read_bytes()[HEADER_BYTES:] for file in blob_files(folder)] == [b"theirs"]
    assert tier.take_loaded(ticket).missing == (A,)
    assert not any(tier.has(name) for name in (A, B, C, D))
    assert tier.stats().num_refused == {"forgotten": 2}
    tier.keep({A: b"anew"})
    assert tier.read(A) == {A: b"anew"}


# ---- the folder is shared ----


def test_blob_of_another_server_is_found_by_the_next_scan(make_tier: MakeTier) -> None:
    one, two = make_tier(), make_tier(scan_interval_s=0.02)
    one.keep({A: b"one"})
    wait_until(lambda: two.has(A))
    assert two.read(A) == {A: b"one"}


def test_blob_of_another_server_is_loaded_even_before_that(make_tier: MakeTier) -> None:
    one, two = make_tier(), make_tier()
    one.keep({A: b"one"})
    assert not two.has(A)
    assert two.read(A) == {A: b"one"}


def test_blob_that_another_server_deleted_is_a_miss(make_tier: MakeTier) -> None:
    one, two = make_tier(), make_tier(is_ready=True)
    one.keep({A: b"one"})
    two.read(A)
    one.forget()
    assert one.flush(TIMEOUT_S)
    assert two.read(A) == {}
    assert not two.has(A)
    two.keep({A: b"one"})
    assert one.read(A) == {A: b"one"}


def test_two_servers_write_the_same_names_at_once(make_tier: MakeTier, folder: Path) -> None:
    blobs = {named(str(number)): bytes([number]) * 1000 for number in range(50)}
    tiers = [make_tier() for _ in range(2)]
    for name, payload in blobs.items():
        for tier in tiers:
            tier.save(name, payload)
    assert all(tier.flush(TIMEOUT_S) for tier in tiers)
    assert all(tier.read(*blobs) == blobs for tier in tiers)
    assert len(blob_files(folder)) == 50
    assert list(folder.rglob("*.tmp")) == []


def test_other_model_finds_nothing(make_tier: MakeTier) -> None:
    make_tier().keep({A: b"one"})
    other = make_tier(fingerprint=b"another model...")
    assert not other.has(A)
    assert other.read(A) == {}


# ---- encryption ----


def test_encrypted_blobs_are_read_with_their_key_only(make_tier: MakeTier, folder: Path) -> None:
    sealed = make_tier(key=KEY)
    sealed.keep({A: b"a secret prompt"})
    (file,) = blob_files(folder)
    assert b"secret" not in file.read_bytes()
    assert make_tier(key=KEY).read(A) == {A: b"a secret prompt"}
    for key in (None, bytes(32)):
        stranger = make_tier(key=key)
        assert not stranger.has(A)
        assert stranger.read(A) == {}
        assert stranger.stats().num_corrupt == 0
    assert file.exists()


def test_encrypted_file_in_the_wrong_folder_is_left_alone(make_tier: MakeTier, folder: Path) -> None:
    make_tier(key=KEY).keep({A: b"a secret prompt"})
    (file,) = blob_files(folder)
    plain = make_tier()
    plain.keep({A: b"plain"})
    (place,) = [found for found in blob_files(folder) if found != file]
    plain.close()
    place.write_bytes(file.read_bytes())
    again = make_tier()
    assert again.read(A) == {}
    assert place.exists()
    assert not again.has(A)
    again.keep({A: b"plain"})
    assert again.read(A) == {A: b"plain"}


# ---- the end ----


def test_closed_tier_answers_everything(make_tier: MakeTier) -> None:
    tier = make_tier()
    tier.keep({A: b"one"})
    tier.close()
    assert not tier.save(B, b"two")
    assert tier.read(A) == {}
    assert tier.flush(0)
    tier.touch([A])
    tier.forget()
    tier.close()
    stats = tier.stats()
    assert (stats.is_writable, stats.num_refused) == (False, {"closed": 1})


def test_nobody_waits_for_a_thread_that_died(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    died = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: died.set())
    tier = make_tier()

    def broken(*args: Any, **keywords: Any) -> None:
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(BlobFolder, "read", broken)
    assert tier.read(A) == {}
    assert died.wait(TIMEOUT_S)
    assert not tier.save(B, b"two")
    assert "has ended" in str(tier.stats().problem)


# ---- from the settings ----


def test_no_folder_no_tier() -> None:
    assert open_tier(Config(), named("model")) is None


def test_settings_make_a_tier(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY.hex())
    config = Config(
        ssd_cache_dir=str(tmp_path / "a" / "b"),
        ssd_cache_min_free_gb=0,
        ssd_cache_daily_write_gb=1e-6,
        ssd_cache_key_file=str(key_file),
    )
    tier = open_tier(config, named("model"))
    assert tier is not None
    assert tier.save(A, bytes(500))
    assert tier.flush(TIMEOUT_S)
    assert not tier.save(B, bytes(500))
    tier.close()
    (file,) = blob_files(tmp_path)
    assert file.stat().st_size == HEADER_BYTES + 500 + 16
    assert os.path.commonpath([file, tmp_path / "a" / "b"]) == str(tmp_path / "a" / "b")


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"--ssd-cache-dir: .* is not a folder"):
            open_tier(Config(ssd_cache_dir=str(path)), named("model"))
