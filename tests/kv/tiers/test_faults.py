"""Whatever happens to the disk: exact bytes or a miss, never an exception, and the tier goes on."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_tier import MODEL, TIMEOUT_S, Clock, MakeTier, Tier, blob_files, named, wait_until

from vllm_mlx.kv.tiers.folder import BlobFolder

A, B, C = (named(letter) for letter in "abc")
PAYLOAD = b"the payload of a page"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The warnings that the tier has logged."""
    monkeypatch.setattr(logging.getLogger("vllm_mlx"), "propagate", True)
    caplog.set_level("WARNING", logger="vllm_mlx.kv")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.fixture
def saved(make_tier: MakeTier, folder: Path) -> Path:
    """The file of blob A, and no tier."""
    tier = make_tier()
    tier.keep({A: PAYLOAD})
    tier.close()
    (file,) = blob_files(folder)
    return file


def make_old(file: Path, *, by_s: float) -> None:
    date = time.time() - by_s
    os.utime(file, (date, date))


# ---- files that are not what was written ----


def test_torn_write_at_every_byte_is_never_returned(make_tier: MakeTier, saved: Path) -> None:
    tier, content = make_tier(), saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        assert tier.read(A) == {}
        assert not saved.exists()
    assert tier.stats().num_corrupt == len(content)
    saved.write_bytes(content)
    assert tier.read(A) == {A: PAYLOAD}


def test_every_flipped_bit_is_never_returned(make_tier: MakeTier, saved: Path) -> None:
    tier, content = make_tier(), saved.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(flipped)
        assert tier.read(A) == {}, f"bit {bit}"
    tier.keep({A: PAYLOAD})
    assert tier.read(A) == {A: PAYLOAD}


def test_corrupt_file_is_deleted_and_said_once(
    make_tier: MakeTier, saved: Path, warnings: Callable[[], list[str]]
) -> None:
    saved.write_bytes(saved.read_bytes()[:-1] + b"?")
    tier = make_tier()
    assert tier.has(A)
    assert tier.read(A) == {}
    assert not tier.has(A)
    assert not saved.exists()
    saved.write_bytes(b"rubbish")
    assert tier.read(A) == {}
    assert tier.stats().num_corrupt == 2
    assert warnings() == ["A corrupt file in the cache on disk is deleted"]


def test_other_format_version_is_left_alone(make_tier: MakeTier, saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[8] += 1
    saved.write_bytes(content)
    tier = make_tier(scan_interval_s=0.02)
    assert tier.read(A) == {}
    assert not tier.has(A)
    time.sleep(0.1)
    assert not tier.has(A), "a scan brought it back"
    assert tier.stats().folder_bytes == len(content)
    tier.keep({A: PAYLOAD})
    assert tier.read(A) == {A: PAYLOAD}


def test_file_of_another_model_is_never_returned(make_tier: MakeTier, folder: Path, saved: Path) -> None:
    other_model = b"another model..."
    place = folder / other_model.hex() / saved.parent.name / saved.name
    place.parent.mkdir(parents=True)
    shutil.copy(saved, place)
    tier = make_tier(fingerprint=other_model)
    assert tier.has(A)
    assert tier.read(A) == {}
    assert not tier.has(A)
    assert place.exists()


def test_file_under_another_name_is_deleted(make_tier: MakeTier, folder: Path, saved: Path) -> None:
    place = folder / MODEL.hex() / B.hex()[:2] / f"{B.hex()}.page"
    place.parent.mkdir(exist_ok=True)
    shutil.copy(saved, place)
    tier = make_tier()
    assert tier.read(B, A) == {A: PAYLOAD}
    assert not place.exists()


def test_strange_files_are_left_alone(make_tier: MakeTier, folder: Path, saved: Path) -> None:
    strange = [folder / "notes.txt", saved.parent / "README", saved.parent / f"{A.hex()}.page.bak"]
    for file in strange:
        file.write_text("not ours")
    (saved.parent / f"{B.hex()}.page").mkdir()
    (folder / ("0" * 32)).write_text("a file where a folder should be")
    tier = make_tier(max_bytes=1000)
    assert tier.read(A, B) == {A: PAYLOAD}
    tier.keep({C: bytes(800)})
    assert all(file.read_text() == "not ours" for file in strange)


def test_leftovers_of_broken_writes_are_deleted_when_old(make_tier: MakeTier, folder: Path, saved: Path) -> None:
    old, young = (saved.with_name(f"{saved.name}.{digit * 16}.tmp") for digit in "01")
    for file in (old, young):
        file.write_bytes(b"half a")
    make_old(old, by_s=700)
    make_old(young, by_s=500)
    gone = folder / f"{MODEL.hex()}.{'0' * 16}.gone" / "ab"
    gone.mkdir(parents=True)
    (gone / "file").write_text("forgotten")
    tier = make_tier()
    assert (old.exists(), young.exists(), gone.parent.exists()) == (False, True, False)
    assert tier.stats().folder_bytes == saved.stat().st_size


# ---- a disk that refuses ----


def refuse(monkeypatch: pytest.MonkeyPatch, owner: Any, function: str, number: int) -> None:
    def refused(*args: Any, **keywords: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, function, refused)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EACCES])
def test_failing_write_pauses_writing_and_recovers(
    make_tier: MakeTier,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: Callable[[], list[str]],
    number: int,
) -> None:
    clock = Clock()
    tier = make_tier(clock=clock)
    tier.keep({A: PAYLOAD})
    with monkeypatch.context() as patch:
        refuse(patch, os, "fsync", number)
        assert [tier.save(B, PAYLOAD), tier.save(C, PAYLOAD)] in ([True, True], [True, False])
        assert tier.flush(TIMEOUT_S)
        assert not tier.save(B, PAYLOAD)
        assert tier.read(A) == {A: PAYLOAD}
        clock.now += 5
        assert tier.save(B, PAYLOAD)
        assert tier.flush(TIMEOUT_S)
        assert os.strerror(number) in str(tier.stats().problem)
    clock.now += 5
    assert not tier.save(B, PAYLOAD), "the second pause is longer"
    clock.now += 5
    tier.keep({B: PAYLOAD})
    assert tier.read(A, B) == {A: PAYLOAD, B: PAYLOAD}
    assert (tier.stats().is_writable, tier.stats().problem) == (True, None)
    assert len(blob_files(folder)) == 2
    assert list(folder.rglob("*.tmp")) == []
    assert warnings() == ["Writing to the cache on disk pauses"] * 2


def test_file_size_limit_of_the_system_is_a_failed_write(make_tier: MakeTier) -> None:
    """A real refusal half-way through a write, without a full disk."""
    tier = make_tier()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        tier.save(A, bytes(2 << 20))
        assert tier.flush(TIMEOUT_S)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tier.read(A) == {}
    assert tier.stats().num_refused == {"write_failed": 1}


def test_file_that_cannot_be_read_is_a_miss_and_stays(
    make_tier: MakeTier, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make_tier()
    with monkeypatch.context() as patch:
        refuse(patch, BlobFolder, "read", errno.EIO)
        assert tier.read(A) == {}
        assert not tier.has(A)
    assert saved.exists()
    assert tier.read(A) == {A: PAYLOAD}


def test_forgotten_blobs_stay_out_of_reach_while_the_disk_refuses(
    make_tier: MakeTier, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make_tier(scan_interval_s=0.02)
    with monkeypatch.context() as patch:
        refuse(patch, BlobFolder, "discard_model", errno.EROFS)
        assert tier.forget() == 1
        time.sleep(0.1)
        assert not tier.has(A)
        assert tier.read(A) == {}
        assert not tier.flush(0)
    assert tier.flush(TIMEOUT_S)
    assert not saved.exists()


def test_folder_that_cannot_be_looked_through_is_an_empty_one(
    make_tier: MakeTier, saved: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, os, "scandir", errno.EIO)
        tier = make_tier(scan_interval_s=0.02)
        assert tier.stats().num_blobs == 0
        assert warnings() == ["The cache on disk cannot be looked through"]
    wait_until(lambda: tier.has(A))


def test_vanished_folder_is_made_again(make_tier: MakeTier, folder: Path, saved: Path) -> None:
    tier = make_tier()
    shutil.rmtree(folder)
    assert tier.read(A) == {}
    tier.keep({A: PAYLOAD})
    assert tier.read(A) == {A: PAYLOAD}


# ---- real small and read-only disks, in a namespace of the kernel's ----

SCRIPT = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from disk_tier import MODEL, TIMEOUT_S, Tier, named

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", sys.argv[2]], check=True)

def tier():
    return Tier(Path(sys.argv[2]), fingerprint=MODEL, max_bytes=1 << 30, daily_write_bytes=None, min_free_bytes=0)

A, B = named("a"), named("b")
mount("size=1m")
"""
FULL = """
from vllm_mlx.kv.tiers.folder import BlobFolder

full = tier()
full.keep({A: bytes(600_000)})
BlobFolder.free_bytes = lambda self: 1 << 40  # as if the space were lost between the question and the write
assert full.save(B, bytes(600_000)) and full.flush(TIMEOUT_S)
assert full.read(A, B) == {A: bytes(600_000)}
assert full.stats().num_refused == {"write_failed": 1}, full.stats()
assert "No space left" in full.stats().problem
assert not list(Path(sys.argv[2]).rglob("*.tmp"))
"""
READ_ONLY = """
first = tier()
first.keep({A: b"one"})
first.close()
mount("remount,ro")
second = tier()
assert second.save(B, b"two") and second.flush(TIMEOUT_S)
assert second.read(A, B) == {A: b"one"}
assert "Read-only" in second.stats().problem
second.forget()
assert second.read(A) == {}
second.close()
"""


@pytest.fixture
def in_namespace(tmp_path: Path) -> Callable[[str], None]:
    """Runs a script that may mount what it likes, seen by nobody else; skips where the system does not allow it."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")

    def run(script: str) -> None:
        command = [*unshare, sys.executable, "-c", SCRIPT + script, str(ROOT / "tests"), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
        if "mount:" in done.stderr:
            pytest.skip("no mounts here")
        assert done.returncode == 0, done.stderr

    return run


def test_disk_that_is_really_full(in_namespace: Callable[[str], None]) -> None:
    in_namespace(FULL)


def test_disk_that_is_really_read_only(in_namespace: Callable[[str], None]) -> None:
    in_namespace(READ_ONLY)


# ---- killed while writing ----

WRITER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from disk_tier import MODEL, Tier, named

tier = Tier(
    Path(sys.argv[2]), fingerprint=MODEL, max_bytes=24 << 20, daily_write_bytes=None, min_free_bytes=0,
    max_queued_bytes=4 << 20,
)
print("writing", flush=True)
number = int(sys.argv[3])
if "hanging" in sys.argv:
    os.fsync = lambda descriptor: time.sleep(600)
while True:
    number += tier.save(named(str(number)), bytes([number % 256]) * 700_000)
    time.sleep(0.0005)
"""


@pytest.fixture
def start_writer(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that writes 700,000 bytes a blob, as fast as it can or `hanging` before the first is named."""
    started: list[subprocess.Popen[str]] = []

    def start(first: int, *, hanging: bool = False) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(ROOT / "tests"), str(folder), str(first)]
        command += ["hanging"] * hanging
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "writing\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(TIMEOUT_S)
        assert process.stdout is not None
        process.stdout.close()


def blob_of(folder: Path, number: int) -> Path:
    """Where the writer's blob of that number lies."""
    digits = named(str(number)).hex()
    return folder / MODEL.hex() / digits[:2] / f"{digits}.page"


def check_contents(tier: Tier, numbers: range) -> int:
    """How many of the writer's blobs are there; every one of them whole."""
    names = {named(str(number)): number for number in numbers}
    found = tier.read(*names)
    assert all(payload == bytes([names[name] % 256]) * 700_000 for name, payload in found.items())
    return len(found)


def test_killed_writers_leave_whole_blobs_only(
    make_tier: MakeTier, folder: Path, start_writer: Callable[..., subprocess.Popen[str]]
) -> None:
    for attempt in range(6):
        process = start_writer(1000 * attempt)
        wait_until(lambda first=1000 * attempt: blob_of(folder, first + 1).exists())
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait(TIMEOUT_S)
    for leftover in folder.rglob("*.tmp"):
        make_old(leftover, by_s=3600)
    tier = make_tier()
    assert tier.stats().num_blobs == len(blob_files(folder)) > 0
    num_found = sum(check_contents(tier, range(1000 * attempt, 1000 * attempt + 100)) for attempt in range(6))
    assert num_found == tier.stats().num_blobs
    assert tier.stats().num_corrupt == 0
    assert list(folder.rglob("*.tmp")) == []


def test_writer_killed_before_the_rename_leaves_nothing_to_load(
    make_tier: MakeTier, folder: Path, start_writer: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start_writer(0, hanging=True)
    wait_until(lambda: list(folder.rglob("*.tmp")) != [])
    (leftover,) = folder.rglob("*.tmp")
    wait_until(lambda: leftover.stat().st_size == 700_080)
    process.send_signal(signal.SIGKILL)
    process.wait(TIMEOUT_S)
    make_old(leftover, by_s=3600)
    tier = make_tier()
    assert check_contents(tier, range(10)) == 0
    assert [file.name for file in folder.rglob("*.*")] == ["written.lock"]


def test_server_reads_while_another_writes_and_deletes(
    make_tier: MakeTier, start_writer: Callable[..., subprocess.Popen[str]]
) -> None:
    tier = make_tier(scan_interval_s=0.01)
    start_writer(0)
    num_found = 0
    for _ in range(30):
        num_found += check_contents(tier, range(40))
    wait_until(lambda: tier.stats().num_blobs > 0)
    num_found += check_contents(tier, range(2000))
    assert num_found > 0
    assert tier.stats().num_corrupt == 0
