"""The scheduler, step by step. `tests/engine/test_scheduler_properties.py` has the random ones."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.core.log import get_logger
from vllm_mlx.core.messages import FinishReason, Output, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import Step, StepResult, TokenLogprobs
from vllm_mlx.engine.scheduler import Scheduler
from vllm_mlx.kv.blocks import page_name
from vllm_mlx.testing.fake import FakeRunner

PAGE = 4


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the engine logs, whether or not the package's logs are set up to go on to the root logger."""
    logger = get_logger("engine")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.DEBUG, logger=logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def scheduler(*, num_pages: int = 64, max_model_len: int = 64, clock: Any = None, **settings: Any) -> Scheduler:
    runner = FakeRunner(num_pages=num_pages, page_size=PAGE, max_model_len=max_model_len, vocab_size=10_000)
    config = Config(**{"prefill_step_size": 64, "prefix_cache": False, **settings})
    return Scheduler(runner.info, config, clock=clock or (lambda: 0.0))


def submit(name: str, num_prompt: int = 3, *, priority: int = 0, resume: tuple[int, ...] = (), **given: Any) -> Submit:
    sampling = SamplingParams(**{"seed": 1, "max_tokens": 20, **given})
    return Submit(name, Prompt(tuple(range(1, num_prompt + 1))), sampling, priority, resume)


def plan(s: Scheduler) -> Step:
    step = s.plan()
    s.check()
    assert step is not None
    return step


def commit(s: Scheduler, step: Step, *token_ids: int, **given: Any) -> tuple[Output, ...]:
    """Commit with these tokens (50 for each row if none are given); what there is to tell."""
    chosen = token_ids or (50,) * len(step.sampled_slots)
    s.commit(StepResult(number=step.number, token_ids=chosen, **given))
    s.check()
    return s.take_outputs()


def advance(s: Scheduler, rounds: int = 1) -> list[Output]:
    """Rounds without overlap."""
    return [output for _ in range(rounds) for output in commit(s, plan(s))]


# ---- chunks ----


def test_long_prompt_is_computed_in_chunks_that_end_on_pages() -> None:
    s = scheduler(prefill_step_size=10)
    s.submit(submit("a", 21))
    steps = [plan(s) for _ in range(3)]
    assert [(row.start, len(row.token_ids), row.samples) for step in steps for row in step.prefills] == [
        (0, 8, False),
        (8, 8, False),
        (16, 5, True),
    ]
    assert [len(step.new) for step in steps] == [1, 0, 0]


def test_chunk_smaller_than_a_page_is_possible() -> None:
    s = scheduler(prefill_step_size=3)
    s.submit(submit("a", 7))
    assert [plan(s).prefills[0].token_ids for _ in range(3)] == [(1, 2, 3), (4,), (5, 6, 7)]


def test_several_short_prompts_share_a_step() -> None:
    s = scheduler(prefill_step_size=10)
    for name in "abcd":
        s.submit(submit(name, 3))
    step = plan(s)
    assert [(row.slot, row.samples) for row in step.prefills] == [(0, True), (1, True), (2, True)]
    assert step.sampled_slots == (0, 1, 2)


def test_every_running_sequence_decodes_while_a_long_prompt_is_computed() -> None:
    s = scheduler(prefill_step_size=8)
    s.submit(submit("a"))
    s.submit(submit("b"))
    advance(s)
    s.submit(submit("long", 30))
    for _ in range(3):
        step = plan(s)
        assert [row.slot for row in step.decodes] == [0, 1]
        assert [row.slot for row in step.prefills] == [2]
        commit(s, step)


def test_chunks_shrink_while_sequences_decode() -> None:
    s = scheduler(prefill_step_size=2048, max_model_len=4096, num_pages=2048, decode_stall_ms=100.0)
    s.submit(submit("a", 1000))
    commit(s, plan(s), elapsed_s=1.0)
    s.submit(submit("long", 4000))
    step = plan(s)
    assert len(step.decodes) == 1
    assert len(step.prefills[0].token_ids) == 100


# ---- overlap ----


def test_next_step_is_planned_while_tokens_are_unknown() -> None:
    s = scheduler()
    s.submit(submit("a"))
    first, second = plan(s), plan(s)
    assert first.prefills[0].samples
    assert second.decodes[0].position == 3
    assert commit(s, first, 42) == (Output("a", (42,), queued_s=0.0),)
    third = plan(s)
    assert third.decodes[0].position == 4
    assert commit(s, second, 43) == (Output("a", (43,)),)


def test_page_table_is_the_same_tuple_until_a_page_is_added() -> None:
    s = scheduler()
    s.submit(submit("a", 3))
    tables = [plan(s).prefills[0].page_ids, *(plan(s).decodes[0].page_ids for _ in range(8))]
    assert [len(table) for table in tables] == [1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert all((a is b) == (len(a) == len(b)) for a, b in itertools.pairwise(tables))


def test_sequence_that_ends_in_the_step_in_flight_is_not_planned_again() -> None:
    s = scheduler()
    s.submit(submit("a", max_tokens=2))
    first, second = plan(s), plan(s)
    assert s.plan() is None
    commit(s, first)
    assert s.plan() is None
    (output,) = commit(s, second, 44)
    assert output == Output("a", (44,), finish=FinishReason.LENGTH)


def test_token_after_the_stop_token_is_dropped() -> None:
    s = scheduler()
    s.submit(submit("a", stop_token_ids=(7,)))
    first, second = plan(s), plan(s)
    (output,) = commit(s, first, 7)
    assert (output.token_ids, output.finish) == ((7,), FinishReason.STOP)
    assert commit(s, second, 8) == ()


def test_slot_and_pages_are_reused_in_the_step_that_releases_them() -> None:
    s = scheduler(max_num_seqs=1)
    s.submit(submit("a", 8, stop_token_ids=(7,)))
    s.submit(submit("b", 8))
    first, second = plan(s), plan(s)
    commit(s, first, 7)
    third = plan(s)
    assert third.released == (0,)
    assert third.new[0].slot == 0
    assert third.prefills[0].page_ids == first.prefills[0].page_ids
    commit(s, second, 9)
    assert commit(s, third, 11)[0].token_ids == (11,)


def test_last_end_is_told_to_the_runner_by_a_step_without_rows() -> None:
    s = scheduler()
    s.submit(submit("a", max_tokens=1))
    advance(s)
    assert s.has_work
    step = plan(s)
    assert (step.released, step.num_tokens) == ((0,), 0)
    assert commit(s, step) == ()
    assert not s.has_work
    assert s.plan() is None


def test_result_of_another_step_is_refused() -> None:
    s = scheduler()
    s.submit(submit("a"))
    plan(s)
    with pytest.raises(ValueError, match="step 0"):
        s.commit(StepResult(number=1, token_ids=(1,)))


# ---- ends ----


def test_min_tokens_outlasts_a_stop_token() -> None:
    s = scheduler()
    s.submit(submit("a", min_tokens=2, stop_token_ids=(50,)))
    assert [output.finish for output in advance(s, 3)] == [None, None, FinishReason.STOP]


def test_context_ends_a_sequence() -> None:
    s = scheduler(max_model_len=6)
    s.submit(submit("a", 3, max_tokens=None))
    assert [output.finish for output in advance(s, 3)] == [None, None, FinishReason.LENGTH]


@pytest.mark.parametrize("rounds", [0, 1])
def test_aborted_sequence_leaves_at_once_and_silently(rounds: int) -> None:
    s = scheduler()
    s.submit(submit("a"))
    advance(s, rounds)
    in_flight = plan(s) if rounds else None
    s.abort("a")
    s.abort("unknown")
    s.check()
    assert s.stats().pages_used == 0
    assert in_flight is None or commit(s, in_flight) == ()
    assert s.take_outputs() == ()


def test_name_can_be_used_again_while_the_aborted_one_is_in_flight() -> None:
    s = scheduler()
    s.submit(submit("a"))
    old = plan(s)
    s.abort("a")
    s.submit(submit("a", 5))
    new = plan(s)
    assert commit(s, old, 9) == ()
    assert commit(s, new, 10)[0].token_ids == (10,)


# ---- refusals ----


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (submit("x", 0), "empty"),
        (submit("x", 64), "at most 63 fit the context of 64"),
        (submit("x", 41), "The prompt has 41 tokens; the KV cache has room for 40"),
        (msgspec.structs.replace(submit("x"), prompt=Prompt((1, 10_000))), "Token id 10000 is outside"),
        (msgspec.structs.replace(submit("x"), prompt=Prompt((1, -1))), "Token id -1 is outside"),
        (submit("x", 3, resume=(10_000,)), "Token id 10000 is outside"),
        (submit("a", 3), "'a' is running already"),
    ],
)
def test_sequence_that_can_never_run_is_refused(asked: Submit, message: str) -> None:
    s = scheduler(num_pages=11)
    s.submit(submit("a"))
    s.submit(asked)
    (output,) = s.take_outputs()
    assert (output.request_id, output.finish, output.token_ids) == (asked.request_id, FinishReason.ERROR, ())
    assert message in (output.message or "")


def test_full_queue_rejects() -> None:
    s = scheduler(max_num_seqs=1, max_waiting=2)
    for name in "abcd":
        s.submit(submit(name))
    (output,) = s.take_outputs()
    assert (output.request_id, output.finish) == ("d", FinishReason.REJECTED)


def test_server_without_a_queue_still_serves() -> None:
    s = scheduler(max_num_seqs=1, max_waiting=0)
    s.submit(submit("a"))
    s.submit(submit("b"))
    assert [output.request_id for output in s.take_outputs()] == ["b"]
    assert plan(s).num_tokens == 3


def test_resumed_sequence_is_never_rejected() -> None:
    s = scheduler(max_num_seqs=1, max_waiting=0)
    s.submit(submit("a"))
    s.submit(submit("b", resume=(5,)))
    assert s.take_outputs() == ()


# ---- order ----


def test_priority_goes_before_arrival() -> None:
    s = scheduler(max_num_seqs=1)
    for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 3)):
        s.submit(submit(name, priority=priority, max_tokens=1))
    assert [output.request_id for output in advance(s, 4)] == ["high", "first", "second", "low"]


def test_urgent_prompt_goes_before_a_long_one_half_computed() -> None:
    s = scheduler(prefill_step_size=8)
    s.submit(submit("long", 40))
    advance(s)
    s.submit(submit("urgent", 3, priority=1))
    assert [(row.slot, row.start) for row in plan(s).prefills] == [(1, 0), (0, 8)]


def test_nobody_overtakes_a_sequence_that_waits_for_pages() -> None:
    s = scheduler(num_pages=7)
    s.submit(submit("a", 15))
    advance(s)
    s.submit(submit("big", 12))
    s.submit(submit("small", 1))
    assert plan(s).prefills == ()
    assert s.stats().num_waiting == 2


# ---- preemption ----


def crowded() -> Scheduler:
    """Two sequences that fill four pages; the next token of either needs a fifth."""
    s = scheduler(num_pages=5)
    s.submit(submit("old", 4))
    s.submit(submit("young", 4))
    advance(s, 5)
    assert s.stats().pages_free == 0
    return s


def test_youngest_is_preempted_when_pages_run_out() -> None:
    s = crowded()
    step = plan(s)
    assert (step.released, [row.slot for row in step.decodes], step.prefills) == ((1,), [0], ())
    stats = s.stats()
    assert (stats.num_preemptions, stats.num_running, stats.num_waiting) == (1, 1, 1)


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    s = crowded()
    s.submit(submit("urgent", 1, priority=1))
    step = plan(s)
    assert (step.released, step.new) == ((1,), ())
    commit(s, step)
    assert [new.num_prompt for new in plan(s).new] == [1]


def test_lowest_priority_is_preempted_first() -> None:
    s = scheduler(num_pages=5)
    s.submit(submit("old", 4))
    s.submit(submit("urgent", 4, priority=1))
    advance(s, 5)
    assert [output.request_id for output in commit(s, plan(s))] == ["urgent"]


def test_token_on_its_way_to_a_preempted_sequence_is_kept() -> None:
    s = scheduler(num_pages=5)
    s.submit(submit("old", 4))
    s.submit(submit("young", 4))
    advance(s, 4)
    in_flight = plan(s)
    preempting = plan(s)
    assert preempting.released == (1,)
    assert [output.token_ids for output in commit(s, in_flight, 61, 62)] == [(61,), (62,)]
    s.abort("old")
    resumed = plan(s)
    assert resumed.new[0].token_ids == (1, 2, 3, 4, 50, 50, 50, 50, 62)
    assert resumed.new[0].num_prompt == 4
    assert resumed.prefills[0].samples


def test_preempted_sequence_returns_when_the_others_have_room_to_grow() -> None:
    s = scheduler(num_pages=8)
    for name, num_prompt in (("old", 8), ("middle", 4), ("young", 4)):
        s.submit(submit(name, num_prompt))
    advance(s, 6)
    s.abort("middle")
    assert (s.stats().num_waiting, s.stats().pages_free) == (1, 3)
    assert plan(s).new == ()  # it needs these three, but then "old" could not grow
    s.abort("old")
    assert len(plan(s).new) == 1


def test_lone_sequence_that_cannot_grow_ends_with_length(logged: pytest.LogCaptureFixture) -> None:
    s = scheduler(num_pages=3)
    s.submit(submit("a", 4))
    advance(s, 4)
    last = plan(s)
    assert s.plan() is None  # its last token is on the way
    commit(s, last)
    assert plan(s).num_tokens == 0
    assert s.take_outputs() == (Output("a", finish=FinishReason.LENGTH),)
    assert "KV cache is too small" in logged.text


def test_prompt_that_fills_the_pool_gets_one_token() -> None:
    s = scheduler(num_pages=3)
    s.submit(submit("a", 8))
    assert [output.token_ids for output in advance(s)] == [(50,)]
    plan(s)
    assert s.take_outputs() == (Output("a", finish=FinishReason.LENGTH),)


# ---- resuming after a restart ----


def test_resumed_tokens_count_as_output() -> None:
    s = scheduler()
    s.submit(submit("a", 3, resume=(8, 9), max_tokens=3))
    step = plan(s)
    assert (step.new[0].token_ids, step.new[0].num_prompt) == ((1, 2, 3, 8, 9), 3)
    assert commit(s, step, 10)[0].finish is FinishReason.LENGTH


@pytest.mark.parametrize(("given", "reason"), [({"max_tokens": 2}, "length"), ({"stop_token_ids": (9,)}, "stop")])
def test_sequence_that_was_complete_before_the_restart_ends_at_once(given: dict[str, Any], reason: str) -> None:
    s = scheduler()
    s.submit(submit("a", 3, resume=(8, 9), **given))
    assert s.take_outputs() == (Output("a", finish=FinishReason(reason)),)
    assert not s.has_work


# ---- what is told ----


def test_wait_is_told_once_with_the_first_token() -> None:
    times = iter([10.0, 12.5])
    s = scheduler(clock=lambda: next(times))
    s.submit(submit("a"))
    assert [output.queued_s for output in advance(s, 2)] == [2.5, None]


def test_what_a_long_prompt_found_is_told_when_its_first_chunk_is_planned() -> None:
    s = scheduler(prefill_step_size=10)
    s.submit(submit("a", 21))
    step = plan(s)
    assert [(output.token_ids, output.num_cached) for output in s.take_outputs()] == [((), 0)]
    assert commit(s, step) == ()
    assert [len(output.token_ids) for output in advance(s, 2)] == [1]


def test_logprobs_go_to_who_asked() -> None:
    s = scheduler()
    s.submit(submit("a"))
    s.submit(submit("b", logprobs=0))
    found = TokenLogprobs(-0.5)
    assert [output.logprobs for output in commit(s, plan(s), 5, 6, logprobs=(None, found))] == [None, (found,)]


def test_stats_count_tokens_steps_and_pages() -> None:
    s = scheduler(num_pages=10, max_num_seqs=1)
    s.submit(submit("a", 6))
    s.submit(submit("b", 6))
    advance(s, 3)
    stats = s.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 1)
    assert (stats.num_steps, stats.num_tokens) == (3, 8)
    assert (stats.pages_used, stats.pages_free) == (2, 7)


def test_full_pages_are_named_by_their_tokens_and_salt() -> None:
    s = scheduler(prefix_cache=True)
    asked = submit("a", 7)
    s.submit(msgspec.structs.replace(asked, prompt=Prompt(asked.prompt.token_ids, salt=b"tenant")))
    first = page_name(b"", (1, 2, 3, 4), salt=b"tenant")
    second = page_name(first, (5, 6, 7, 50), salt=b"tenant")
    advance(s)
    assert (s._kv._pool.find(first), s._kv._pool.find(second)) == (1, None)
    advance(s)
    assert s._kv._pool.find(second) == 2


def test_model_without_pages_has_empty_tables() -> None:
    s = scheduler(num_pages=0)
    s.submit(submit("a", 40))
    first, second = plan(s), plan(s)
    assert first.prefills[0].page_ids == second.decodes[0].page_ids == ()
