"""Prefixes that are moved, dropped and forgotten while steps are under way: nothing wrong is ever found."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
from prefix_world import KINDS, World, opened, submit

from vllm_mlx.core.prompt import Prompt
from vllm_mlx.kv import disk
from vllm_mlx.kv.tiers.record import Kind
from vllm_mlx.testing.held import StagedBytes

TIMEOUT_S = 30.0


def store_twice_used(folder: Path, *prompts: object, kind: str = "pages") -> None:
    """Have prompts on disk."""
    with opened(kind, disk=folder, num_pages=64) as world:
        for i, prompt in enumerate(prompts):
            for turn in range(2):
                world.run(submit(f"{i} {turn}", prompt, max_tokens=1))
        wait_until_written(world)


def wait_until_written(world: World) -> None:
    assert world.disk is not None
    deadline = time.monotonic() + TIMEOUT_S
    while world.disk.stats().queued_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_until_read(world: World, num_blobs: int) -> None:
    """Until that many blobs were read ahead, and none was taken."""
    assert world.disk is not None
    deadline = time.monotonic() + TIMEOUT_S
    while world.disk.stats().num_hits < num_blobs:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_state_that_comes_in_is_not_sent_out_in_the_same_step(kind: str, tmp_path: Path) -> None:
    store_twice_used(tmp_path, range(40), kind=kind)
    with opened(kind, disk=tmp_path, ssd_cache_max_gb=2e-6) as world:
        assert world.disk is not None
        world.scheduler.submit(submit("a", range(40), max_tokens=1))
        world.round()
        wait_until_read(world, world.disk.stats().num_blobs)
        # What was read loses its place on the disk, so that it is worth being written again.
        for i in range(20):
            world.disk.offer(Kind.PAGE, bytes([i] * 16))
        others = world.disk.take_exports(20, find=lambda kind, name: 0)
        world.disk.store(others, [bytes(16)] * len(others))
        wait_until_written(world)
        assert world.disk.stats().num_evicted > 0
        world.run()
        assert world.num_cached("a") == 36
    with opened(kind, disk=tmp_path) as world:
        world.run(submit("b", range(40), max_tokens=1))


@pytest.mark.parametrize("kind", ["state", "pages and state", "rows"])
def test_a_checkpoint_in_flight_is_not_kept_for_another_of_the_same_name(kind: str) -> None:
    world = World(kind)
    world.scheduler.submit(submit("a", [1] * (8 if "rows" in kind else 20), breakpoints=(8,)))
    world.round()
    world.scheduler.abort("a")
    world.scheduler.submit(submit("a", [2] * 40))
    world.round()
    world.run(submit("b", [*[2] * 8, 5, 5]))


@pytest.mark.parametrize("kind", ["rows", "pages and rows"])
def test_a_pinned_prompt_is_found_after_a_longer_one_is_gone(kind: str) -> None:
    world = World(kind, checkpoint_bytes=400)
    world.run(submit("pinned", range(20), max_tokens=1, pinned=True))
    world.run(submit("longer", [*range(20), *[6] * 12], max_tokens=1))
    for i in range(1, 6):
        world.run(submit(str(i), [i] * 40, max_tokens=1))
    world.run(submit("b", [*range(20), 5, 5, 5], max_tokens=1))
    assert world.num_cached("b") == 20


def test_a_prompt_that_was_known_is_pinned_whole() -> None:
    world = World(num_pages=24)
    world.run(submit("known", range(20), max_tokens=1), submit("pinned", range(20), max_tokens=1, pinned=True))
    for i in range(6):
        world.run(submit(str(i), [i, i, *range(40)], max_tokens=1))
    world.run(submit("b", range(23), max_tokens=1))
    assert world.num_cached("b") == 20


def test_a_prompt_that_goes_on_from_a_pinned_one_needs_room_for_its_end_only() -> None:
    world = World(num_pages=21)
    world.run(submit("pinned", range(36), max_tokens=1, pinned=True))
    world.run(submit("b", range(48), max_tokens=1))
    assert world.num_cached("b") == 36


@pytest.mark.parametrize("kind", ["state", "rows"])
def test_pinned_prompts_leave_room_for_others(kind: str) -> None:
    world = World(kind, checkpoint_bytes=400)
    for i in range(1, 6):
        world.run(submit(f"pinned {i}", [i] * 40, max_tokens=1, pinned=True))
    for name in "ab":
        world.run(submit(name, range(22), max_tokens=1))
    assert world.num_cached("b") == 20


def test_what_is_loaded_does_not_take_the_place_of_what_it_continues(tmp_path: Path) -> None:
    store_twice_used(tmp_path, range(40))
    with opened(disk=tmp_path, num_pages=22) as world:
        world.run(submit("a", range(20), max_tokens=1))
        world.run(submit("other", [3] * 59, max_tokens=1))
        assert world.scheduler.lookup(Prompt(tuple(i % 7 for i in range(40)))).num_memory == 20
        world.run(submit("b", range(40), max_tokens=1))
        assert world.num_cached("b") == 36


def test_what_leaves_while_all_is_forgotten_is_not_stored(tmp_path: Path) -> None:
    with opened(disk=tmp_path) as world:
        world.run(submit("a", range(40), max_tokens=1))
        world.scheduler.submit(submit("b", range(40), max_tokens=1))
        world.round()
        world.scheduler.forget()
        world.run()
    with opened(disk=tmp_path) as world:
        assert world.disk is not None
        assert world.disk.stats().num_blobs == 0


def test_a_disk_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_twice_used(tmp_path, range(40), [3] * 40)
    monkeypatch.setattr(disk, "STALL_S", 0.05)
    with opened(disk=tmp_path) as world:
        pipes = list(tmp_path.rglob("*.page"))
        for path in pipes:
            path.unlink()
            os.mkfifo(path)  # whoever opens it waits for the other end
        try:
            world.run(submit("a", range(40)), submit("b", [3] * 40), submit("c", [5] * 10))
            assert [world.num_cached(name) for name in "abc"] == [0, 0, 0]
        finally:
            deadline = time.monotonic() + 5  # perhaps it was given up before the disk's thread came to it
            while world.disk is not None and world.disk.stats().num_misses == 0 and time.monotonic() < deadline:
                for path in pipes:
                    with contextlib.suppress(OSError):
                        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize("kind", ["state", "rows"])
def test_nobody_waits_for_a_prefix_that_will_not_be_kept(kind: str) -> None:
    world = World(kind, checkpoint_bytes=0, prefill_step_size=64)
    for name in "ab":
        world.scheduler.submit(submit(name, range(30)))
    world.round()
    assert world.scheduler.stats().num_running == 2
    world.run()


def test_own_pages_after_a_preemption_are_not_called_cached() -> None:
    world = World(num_pages=13, prefill_step_size=4)
    world.scheduler.submit(submit("a", [1] * 3, max_tokens=26))
    while len(world.outputs.get("a", ())) < 10:
        world.round()
    world.run(submit("b", [2] * 28, max_tokens=2))
    assert world.scheduler.stats().num_preemptions > 0
    assert max(output.num_cached for output in world.outputs["b"]) == 0


def test_few_bytes_leave_with_one_step_and_all_of_them_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MAX_STEP_BYTES", 3 * 16)  # pages of 16 bytes
    with opened(disk=tmp_path) as world:
        for name in "ab":
            world.run(submit(name, range(40), max_tokens=1))
        assert world.disk is not None
        for i in range(7):
            world.disk.offer(Kind.PAGE, bytes([i] * 16))
        offered = [world.disk.take_exports(16, find=lambda kind, name: 1) for _ in range(3)]
        assert [len(each) for each in offered] == [3, 3, 1]
        before = world.disk.stats().queued_bytes
        assert before >= 7 * 16
        world.disk.store(sum(offered, ()), [StagedBytes(bytes(16))] * 7)
        wait_until_written(world)


def test_one_checkpoint_that_is_larger_than_that_leaves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MAX_STEP_BYTES", 8)
    with opened("state", disk=tmp_path) as world:
        assert world.disk is not None
        for i in range(2):
            world.disk.offer(Kind.CHECKPOINT, bytes([i] * 16), size_bytes=100)
        for _ in range(2):
            assert len(world.disk.take_exports(16, find=lambda kind, name: 1)) == 1
