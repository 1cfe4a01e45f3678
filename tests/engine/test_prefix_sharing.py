"""Sequences that share a prefix compute it once, and get the tokens that they would get without any sharing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_world import KINDS, PAGE, PAGES_ONLY, VOCAB_SIZE, World, opened, submit

from vllm_mlx.core.config import Config
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.kv.disk import open_disk
from vllm_mlx.testing.fake import FakeRunner


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompt_again_computes_only_its_end(kind: str) -> None:
    world = World(kind)
    world.run(submit("a", range(22)))
    assert world.num_prefilled == 22
    world.run(submit("b", range(22)))
    assert world.num_cached("a") == 0
    # Pages are shared to the last token but one, other state from where it was kept.
    num_cached = 21 if kind in PAGES_ONLY else 20
    assert world.num_cached("b") == num_cached
    assert world.num_prefilled == 22 + 22 - num_cached
    assert world.tokens("a") == world.tokens("b")


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_turn_of_a_chat_finds_the_answer_too(kind: str) -> None:
    world = World(kind)
    world.run(submit("a", range(10), max_tokens=12))
    world.run(submit("b", [*world.history("a", range(10)), 1, 2, 3]))
    rows = {**dict.fromkeys(PAGES_ONLY, 21), "state": 20, "pages and state": 20, "windows and state": 20}
    assert world.num_cached("b") == rows.get(kind, 8)  # rows are copied every 256 tokens only


def test_rows_are_found_by_any_shorter_beginning() -> None:
    world = World("rows")
    world.run(submit("a", range(30)))
    world.run(submit("b", [*range(13), 6, 6]))
    assert world.num_cached("b") == 12


@pytest.mark.parametrize("kind", ["state", "pages and state"])
def test_state_is_found_at_breakpoints_only(kind: str) -> None:
    world = World(kind)
    world.run(submit("a", range(30), breakpoints=(9, 17)))
    world.run(submit("b", [*range(15), 6, 6, 6, 6]))
    world.run(submit("c", [*range(26), 6, 6, 6, 6]))
    assert (world.num_cached("b"), world.num_cached("c")) == (8, 16)


def test_part_of_a_page_is_copied_not_shared() -> None:
    world = World()
    world.run(submit("a", range(11), max_tokens=1))
    world.run(submit("b", [*range(10), 6, 6, 6], max_tokens=3))
    assert world.num_cached("b") == 10


def test_forks_compute_their_prompt_once() -> None:
    world = World()
    world.run(*(submit(str(i), range(22), seed=i) for i in range(4)))
    assert [world.num_cached(str(i)) for i in range(4)] == [0, 21, 21, 21]
    assert world.num_prefilled == 22 + 3


def test_a_prefix_is_shared_by_the_step_after_the_one_that_computes_it() -> None:
    world = World(prefill_step_size=64)
    for each in (submit(str(i), range(22), seed=i) for i in range(4)):
        world.scheduler.submit(each)
    first, second = world.scheduler.plan(), world.scheduler.plan()
    assert first is not None
    assert [len(row.token_ids) for row in first.prefills] == [22]
    assert second is not None
    assert {row.start for row in second.prefills} == {21}


def test_old_checkpoints_make_room_for_new_ones() -> None:
    world = World("state", checkpoint_bytes=200)
    for i in range(8):
        world.run(submit(str(i), [i] * 22, max_tokens=1))
    world.run()
    assert 0 < len(world.runner.checkpoints) <= 3
    world.run(submit("again", [0] * 22, max_tokens=1))
    assert world.num_cached("again") == 20  # same tokens modulo the vocabulary: the last ones are there


def test_pinned_prompt_outlives_the_memory_of_others() -> None:
    world = World(num_pages=24)
    world.run(submit("pinned", range(20), max_tokens=1, pinned=True))
    for i in range(6):
        world.run(submit(str(i), [i, i, *range(40)], max_tokens=1))
    assert world.scheduler.stats().pages_pinned == 5
    world.run(submit("b", range(20), max_tokens=1))
    assert world.num_cached("b") >= 16
    world.scheduler.forget()
    world.run(submit("c", range(20), max_tokens=1))
    assert (world.num_cached("c"), world.scheduler.stats().pages_pinned) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_used_twice_is_found_after_a_restart(kind: str, tmp_path: Path) -> None:
    with opened(kind, disk=tmp_path) as world:
        world.run(submit("a", range(40)), submit("once", [3] * 20))
        world.run(submit("b", range(40)))
    with opened(kind, disk=tmp_path) as world:
        match = world.scheduler.lookup(Prompt(tuple(token % VOCAB_SIZE for token in range(40))))
        assert (match.num_memory, match.num_stored) == (0, 36)
        world.run(submit("c", range(40)), submit("d", [3] * 20))
        assert (world.num_cached("c"), world.num_cached("d")) == (36, 0)
        assert world.scheduler.forget().num_stored > 0
        world.run(submit("e", range(40)))
        assert world.num_cached("e") == 0


def test_other_models_state_on_disk_is_not_found(tmp_path: Path) -> None:
    with opened(disk=tmp_path) as world:
        for name in "ab":
            world.run(submit(name, range(40)))
    runner = FakeRunner(page_size=PAGE, fingerprint=b"fingerprint-of-y")
    disk = open_disk(Config(ssd_cache_dir=str(tmp_path), ssd_cache_min_free_gb=0), runner.info)
    assert disk is not None
    assert disk.stats().num_blobs == 0
    disk.close()


def test_aborted_reader_leaves_nothing_behind(tmp_path: Path) -> None:
    with opened(disk=tmp_path) as world:
        for name in "ab":
            world.run(submit(name, range(40)))
    with opened(disk=tmp_path) as world:
        world.scheduler.submit(submit("c", range(40)))
        world.scheduler.plan()
        assert world.scheduler.stats().num_loading == 1
        world.scheduler.abort("c")
        world.run(submit("d", range(40)))
        assert len(world.tokens("d")) == 6


def test_two_prompts_that_arrive_together_compute_their_prefix_once() -> None:
    world = World()
    world.run(submit("a", range(20)), submit("b", [*range(17), 5, 5, 5, 5]), submit("c", range(20), seed=9))
    assert (world.num_cached("b"), world.num_cached("c")) == (16, 16)
    assert world.num_prefilled == 20 + 5 + 4


def test_an_unrelated_prompt_overtakes_one_that_waits_for_its_prefix() -> None:
    world = World(prefill_step_size=48)
    for one in (submit("a", range(40)), submit("b", range(40)), submit("other", [3] * 3, max_tokens=1)):
        world.scheduler.submit(one)
    while "other" not in world.outputs:
        world.round()
    assert not any(output.token_ids for output in world.outputs.get("b", []))
    world.run()


def test_a_prefix_survives_the_abort_of_those_that_computed_it() -> None:
    world = World()
    world.scheduler.submit(submit("a", range(40), max_tokens=20))
    while not any(output.token_ids for output in world.outputs.get("a", [])):
        world.round()
    world.scheduler.abort("a")
    world.run(submit("b", range(40)))
    assert world.num_cached("b") == 36


def test_an_aborted_owner_holds_nobody_up() -> None:
    world = World()
    for name in "ab":
        world.scheduler.submit(submit(name, range(40)))
    world.round()
    world.scheduler.abort("a")
    world.run()
    assert len(world.tokens("b")) == 6


def test_other_tenants_share_nothing() -> None:
    world = World()
    world.run(submit("a", range(22), salt=b"one"), submit("b", range(22), salt=b"two"))
    assert (world.num_cached("b"), world.num_prefilled) == (0, 44)


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    world = World(num_pages=13)
    world.run(*(submit(str(i), [i, *range(14)], max_tokens=14) for i in range(3)))
    assert world.scheduler.stats().num_preemptions > 0
    assert world.num_prefilled < 45 + 15 * world.scheduler.stats().num_preemptions


STEM = [i * i // 7 % 2 for i in range(40)]
prompts = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=40),
    st.builds(lambda length, end: [*STEM[:length], *end][:40], st.integers(1, 40), st.lists(st.integers(0, 1))),
)
arrivals = st.lists(
    st.tuples(
        prompts,
        st.integers(1, 12),
        st.integers(0, 2),
        st.sampled_from([b"", b"x"]),
        st.sampled_from(["", "", "", "abort", "late abort", "pin", "forget"]),
        st.lists(st.integers(0, 40), max_size=3).map(lambda points: tuple(sorted(points))),
    ),
    min_size=1,
    max_size=12,
)
gaps = st.lists(st.integers(0, 6), min_size=12, max_size=12)
orders = st.lists(st.booleans(), min_size=1, max_size=3)


def play(world: World, arrivals: list[Any], gaps: list[int]) -> None:
    for i, (prompt, max_tokens, seed, salt, event, breakpoints) in enumerate(arrivals):
        more = {"max_tokens": max_tokens, "seed": seed, "pinned": event == "pin", "breakpoints": breakpoints}
        world.scheduler.submit(submit(str(i), prompt, salt=salt, **more))
        for _ in range(gaps[i]):
            world.round()
        if event == "abort":
            world.scheduler.abort(str(i))
        elif event == "late abort":
            world.round(late_abort=str(i))
        elif event == "forget":
            world.scheduler.forget()
    world.run()


def check_equal(sharing: World, alone: World, arrivals: list[Any]) -> None:
    for i, (*_, event, _) in enumerate(arrivals):
        ours, theirs = (sharing.tokens(str(i)) if str(i) in sharing.outputs else (), alone.tokens(str(i)))
        assert ours == (theirs[: len(ours)] if "abort" in event else theirs)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    arrivals=arrivals,
    gaps=gaps,
    num_pages=st.integers(28, 60),
    checkpoint_bytes=st.sampled_from([0, 90, 400, 4000]),
    order=orders,
    plans_ahead=st.booleans(),
)
def test_sharing_changes_no_token(
    kind: str,
    arrivals: list[Any],
    gaps: list[int],
    num_pages: int,
    checkpoint_bytes: int,
    order: list[bool],
    plans_ahead: bool,
) -> None:
    settings = {"num_pages": num_pages, "checkpoint_bytes": checkpoint_bytes, "max_num_seqs": 3}
    settings["plans_ahead"] = plans_ahead
    sharing = World(kind, collects_first=order, **settings)
    play(sharing, arrivals, gaps)
    alone = World(kind, prefix_cache=False)
    play(alone, [(*arrival[:4], "", arrival[5]) for arrival in arrivals], gaps)
    check_equal(sharing, alone, arrivals)
    assert set(sharing.runner.checkpoints) <= set(range(10_000))
    sharing.scheduler.forget()
    sharing.run()
    assert sharing.runner.checkpoints == ()


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    arrivals=arrivals,
    gaps=gaps,
    restart_at=st.integers(0, 11),
    order=orders,
    plans_ahead=st.booleans(),
)
def test_a_disk_and_a_restart_change_no_token(
    kind: str, arrivals: list[Any], gaps: list[int], restart_at: int, order: list[bool], plans_ahead: bool
) -> None:
    settings = {"num_pages": 28, "checkpoint_bytes": 300, "max_num_seqs": 3, "collects_first": order}
    settings["plans_ahead"] = plans_ahead
    with tempfile.TemporaryDirectory() as folder:
        for part in (slice(0, restart_at), slice(restart_at, None)):
            with opened(kind, disk=Path(folder), **settings) as world:
                play(world, arrivals[part], gaps)
            alone = World(kind, prefix_cache=False)
            play(alone, [(*arrival[:4], "", arrival[5]) for arrival in arrivals[part]], gaps)
            check_equal(world, alone, arrivals[part])
