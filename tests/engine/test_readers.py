"""Sequences that load their prefixes from the disk at the same time, in memory that has no room for all of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from disk_tier import TIMEOUT_S, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefix_world import KINDS, PAGE, VOCAB_SIZE, World, opened, submit

from vllm_mlx.core.config import Config
from vllm_mlx.kv.build import manager_of
from vllm_mlx.kv.manager import Admission, Admitted

LENGTH = 40
NUM_PAGES = -(-LENGTH // PAGE)
FOUND = LENGTH // PAGE * PAGE - PAGE
"""Tokens of a prompt of `LENGTH` that are on disk and of use: at least one is computed."""


def prompt(number: int, length: int = LENGTH) -> list[int]:
    """Prompts that differ from their first token on."""
    return [(number + i * i) % VOCAB_SIZE for i in range(length)]


def store(folder: Path, *prompts: list[int], kind: str = "pages") -> None:
    """Have prompts on disk."""
    with opened(kind, disk=folder, num_pages=64) as world:
        for i, token_ids in enumerate(prompts):
            for turn in range(2):
                world.run(submit(f"{i} {turn}", token_ids, max_tokens=1))
        disk = world.disk
        assert disk is not None
        wait_until(lambda: not disk.stats().queued_bytes)


def num_read(world: World) -> int:
    assert world.disk is not None
    return world.disk.stats().num_hits


@pytest.mark.parametrize("num_pages", [NUM_PAGES + 2, 2 * NUM_PAGES, 3 * NUM_PAGES, 8 * NUM_PAGES])
def test_each_finds_what_it_read(num_pages: int, tmp_path: Path) -> None:
    store(tmp_path, *(prompt(i) for i in range(5)))
    with opened(disk=tmp_path, num_pages=num_pages) as world:
        world.run(*(submit(str(i), prompt(i), max_tokens=1) for i in range(5)))
        assert [world.num_cached(str(i)) for i in range(5)] == [FOUND] * 5
        assert num_read(world) == 5 * FOUND // PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_that_many_ask_for_is_read_once(kind: str, tmp_path: Path) -> None:
    store(tmp_path, prompt(1), kind=kind)
    with opened(kind, disk=tmp_path) as world:
        assert world.disk is not None
        num_blobs = world.disk.stats().num_blobs
        world.run(*(submit(str(i), prompt(1), max_tokens=1) for i in range(6)))
        assert all(world.num_cached(str(i)) > 0 for i in range(6))
        assert num_read(world) <= num_blobs


def test_what_is_read_is_not_given_to_who_overtakes_while_others_are_free(tmp_path: Path) -> None:
    store(tmp_path, prompt(1))
    with opened(disk=tmp_path, num_pages=3 * NUM_PAGES + 2) as world:
        world.run(submit("old", prompt(2, LENGTH), max_tokens=1))
        world.scheduler.submit(submit("reader", prompt(1), max_tokens=1))
        world.round()
        wait_until(lambda: num_read(world) == FOUND // PAGE)
        world.run(submit("other", prompt(3, LENGTH), max_tokens=1))
        assert world.num_cached("reader") == FOUND


def test_a_sequence_for_which_there_is_no_room_does_not_read_yet(tmp_path: Path) -> None:
    store(tmp_path, prompt(1))
    with opened(disk=tmp_path, num_pages=NUM_PAGES + 3) as world:
        world.scheduler.submit(submit("running", prompt(2, 30), max_tokens=8))
        world.round()
        world.run(submit("reader", prompt(1), max_tokens=1))
        assert world.num_cached("reader") == FOUND


def test_who_is_aborted_in_line_or_while_it_reads_holds_up_nobody(tmp_path: Path) -> None:
    store(tmp_path, *(prompt(i) for i in range(4)))
    with opened(disk=tmp_path, num_pages=NUM_PAGES + 2) as world:
        for i in range(4):
            world.scheduler.submit(submit(str(i), prompt(i), max_tokens=1))
        world.round()
        world.scheduler.abort("0")
        world.scheduler.abort("2")
        world.run()
        assert [world.num_cached(str(i)) for i in (1, 3)] == [FOUND] * 2


@pytest.mark.parametrize("number", [1, 2])
def test_nobody_waits_for_a_reader_that_is_not_looked_at_any_more(number: int, tmp_path: Path) -> None:
    store(tmp_path, prompt(1), prompt(2))
    with opened(disk=tmp_path, num_pages=NUM_PAGES + 4) as world:
        kv = manager_of(world.runner.info, Config(), disk=world.disk, clock=lambda: 0.0)
        assert kv.admit("left out", prompt(1), num_tokens=LENGTH + 1) is Admission.READING
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            kv.begin_pass()
            admitted = kv.admit("first", prompt(number), num_tokens=LENGTH + 1)
            if isinstance(admitted, Admitted):
                break
            assert time.monotonic() < deadline, "it waits for one that nobody looks at"
            time.sleep(0.001)
        assert admitted.num_cached == FOUND
        kv.release("first")
        kv.release("left out")


def test_all_go_on_when_everything_is_forgotten_while_they_read(tmp_path: Path) -> None:
    store(tmp_path, *(prompt(i) for i in range(3)))
    with opened(disk=tmp_path, num_pages=NUM_PAGES + 2) as world:
        for i in range(3):
            world.scheduler.submit(submit(str(i), prompt(i), max_tokens=1))
        world.round()
        world.scheduler.forget()
        world.run()
        assert set(world.outputs) == {"0", "1", "2"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each kind a folder with five prompts."""
    folders = {kind: tmp_path_factory.mktemp("disk") for kind in KINDS}
    for kind, folder in folders.items():
        store(folder, *(prompt(i) for i in range(5)), kind=kind)
    return folders


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 6),  # the last two are on no disk
        st.integers(PAGE, LENGTH),  # how far it is the stored prompt
        st.integers(1, 12),  # tokens of its own
        st.integers(1, 8),  # of its answer
        st.integers(0, 1),  # priority
        st.integers(0, 3),  # rounds until the next
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(KINDS)), num_pages=st.integers(2 * NUM_PAGES, 4 * NUM_PAGES), arrivals=ARRIVALS)
def test_everybody_ends_with_the_tokens_that_it_would_have_alone(
    kind: str, num_pages: int, arrivals: list[tuple[int, int, int, int, int, int]], stored: dict[str, Path]
) -> None:
    submits = [
        submit(str(i), [*prompt(n, same), *prompt(n + i, own)][: 63 - answer], max_tokens=answer, priority=priority)
        for i, (n, same, own, answer, priority, _) in enumerate(arrivals)
    ]
    with opened(kind, disk=stored[kind], num_pages=num_pages, ssd_cache_daily_write_gb=1e-9) as world:
        for one, (*_, pause) in zip(submits, arrivals, strict=True):
            world.scheduler.submit(one)
            for _ in range(pause):
                world.round()
        deadline = time.monotonic() + TIMEOUT_S
        while world.scheduler.has_work or world.rounds.has_in_flight:
            assert time.monotonic() < deadline, "somebody waits for ever"
            if world.scheduler.waits_for_threads:
                time.sleep(0.001)
            world.round()
        shared = {one.request_id: world.tokens(one.request_id) for one in submits}
    alone = World(kind, num_pages=64, prefix_cache=False)
    for one in submits:
        alone.run(one)
        assert shared[one.request_id] == alone.tokens(one.request_id)
