"""The fake runner computes from its pages, and refuses what a real runner could not compute."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import DecodeRow, NewSequence, PrefillRow, Runner, Step, StepResult
from vllm_mlx.testing.fake import ContractError, FakeRunner, fake_factory


def params(**given: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "seed": 7, **given})


def new(slot: int, *token_ids: int, sampling: SamplingParams | None = None) -> NewSequence:
    return NewSequence(slot, sampling or params(), token_ids, len(token_ids))


def run(runner: FakeRunner, number: int, **orders: Any) -> StepResult:
    return runner.collect(runner.launch(Step(number=number, **orders)))


def small(**options: Any) -> FakeRunner:
    return FakeRunner(**{"num_pages": 8, "page_size": 2, "vocab_size": 100, "max_model_len": 32, **options})


def started(runner: FakeRunner, *token_ids: int, slot: int = 0, pages: tuple[int, ...] = (1, 2, 3)) -> int:
    """Prefill one sequence in step 0; its first token."""
    row = PrefillRow(slot, 0, token_ids, pages, True)
    return run(runner, 0, new=(new(slot, *token_ids),), prefills=(row,)).token_ids[0]


def total(tokens: tuple[int, ...]) -> int:
    return sum(tokens) % 100


def test_fake_satisfies_the_runner_protocol() -> None:
    runner: Runner = small()
    assert runner.info.num_pages == 8
    assert runner.info.cache.is_paged


def test_script_sees_all_known_tokens() -> None:
    seen: list[tuple[int, ...]] = []
    runner = small(script=lambda tokens: seen.append(tokens) or 9)
    assert started(runner, 4, 5, 6) == 9
    assert run(runner, 1, decodes=(DecodeRow(0, 3, (1, 2, 3)),)).token_ids == (9,)
    assert seen == [(4, 5, 6), (4, 5, 6, 9)]


def test_known_tokens_are_computed_as_if_they_had_been_sampled() -> None:
    singly, together, pages = small(script=total), small(script=total), (1, 2, 3, 4)
    for runner in (singly, together):
        started(runner, 4, 5, 6, pages=pages)
    rows = (DecodeRow(0, 3, pages, samples=False), DecodeRow(0, 4, pages, token_id=30, samples=False))
    last = DecodeRow(0, 5, pages, token_id=2)
    step = Step(number=1, decodes=(*rows, last))
    assert (step.sampled_slots, step.num_tokens) == ((0,), 3)
    assert together.collect(together.launch(step)).token_ids == ((4 + 5 + 6 + 15 + 30 + 2) % 100,)
    assert run(singly, 1, decodes=(rows[0],)).token_ids == ()
    assert run(singly, 2, decodes=(rows[1],)).token_ids == ()
    assert run(singly, 3, decodes=(last,)).token_ids == ((4 + 5 + 6 + 15 + 30 + 2) % 100,)


def test_only_a_model_all_in_pages_takes_several_rows() -> None:
    decodes = (DecodeRow(0, 3, (1, 2, 3), samples=False), DecodeRow(0, 4, (1, 2, 3), token_id=9))
    runner = small(chunked_decode=False)
    started(runner, 1, 2, 3)
    with pytest.raises(ContractError, match="two rows in one step"):
        runner.launch(Step(number=1, decodes=decodes))
    assert not small(num_pages=0).info.chunked_decode


@pytest.mark.parametrize("options", [{}, {"num_pages": 0}], ids=["pages", "rows"])
def test_chunks_and_whole_prompt_give_the_same_token(options: dict[str, int]) -> None:
    pages = (1, 2, 3) if not options else ()
    whole = started(small(**options), 4, 5, 6, pages=pages)
    chunked = small(**options)
    first = run(chunked, 0, new=(new(0, 4, 5, 6),), prefills=(PrefillRow(0, 0, (4, 5), pages, False),))
    assert first.token_ids == ()
    assert run(chunked, 1, prefills=(PrefillRow(0, 2, (6,), pages, True),)).token_ids == (whole,)


def test_wrong_page_table_gives_wrong_tokens() -> None:
    def second_token(pages: tuple[int, ...]) -> int:
        runner = small(script=total)
        assert started(runner, 1, 2, 3, 4, pages=(1, 2, 3)) == 10
        run(runner, 1, new=(new(1, 9, 9, 9),), prefills=(PrefillRow(1, 0, (9, 9, 9), (5, 6), True),))
        return run(runner, 2, decodes=(DecodeRow(0, 4, pages),)).token_ids[0]

    assert second_token((1, 2, 3)) == 1 + 2 + 3 + 4 + 10
    assert second_token((5, 2, 3)) == 9 + 9 + 3 + 4 + 10


def test_place_that_was_never_written_is_not_read() -> None:
    runner = small()
    started(runner, 1, 2, 3, pages=(1, 2))
    with pytest.raises(ContractError, match="page 4 is read where nothing was written"):
        run(runner, 1, decodes=(DecodeRow(0, 3, (4, 2)),))


def test_tokens_of_an_earlier_sequence_are_not_read() -> None:
    runner = small()
    started(runner, 1, 2, 3, 4, pages=(1, 2, 3))
    row = PrefillRow(1, 0, (9,), (1, 4), True)
    run(runner, 1, released=(0,), new=(new(1, 9),), prefills=(row,))
    with pytest.raises(ContractError, match="page 1 is read where nothing was written"):
        run(runner, 2, new=(new(2, 1, 2, 7),), prefills=(PrefillRow(2, 2, (7,), (1, 4), True),))


def test_results_come_decodes_first() -> None:
    runner = small(script=total)
    assert started(runner, 1, 2, pages=(1, 2)) == 3
    result = run(
        runner,
        1,
        new=(new(1, 50),),
        prefills=(PrefillRow(1, 0, (50,), (3,), True),),
        decodes=(DecodeRow(0, 2, (1, 2)),),
    )
    assert result.token_ids == (6, 50)


def test_seed_changes_sampled_tokens_but_not_greedy_ones() -> None:
    def first(**given: Any) -> int:
        row = PrefillRow(0, 0, (1, 2), (1,), True)
        runner = small(vocab_size=30_000)
        return run(runner, 0, new=(new(0, 1, 2, sampling=params(**given)),), prefills=(row,)).token_ids[0]

    assert first(seed=1) == first(seed=2)
    assert first(seed=1, temperature=1.0) != first(seed=2, temperature=1.0)
    assert first(seed=1, temperature=1.0) == first(seed=1, temperature=1.0)


def test_stop_token_is_not_chosen_before_min_tokens() -> None:
    runner = small(script=lambda tokens: 5)
    sampling = params(stop_token_ids=(5, 6), min_tokens=1)
    row = PrefillRow(0, 0, (1,), (1, 2), True)
    assert run(runner, 0, new=(new(0, 1, sampling=sampling),), prefills=(row,)).token_ids == (7,)
    assert run(runner, 1, decodes=(DecodeRow(0, 1, (1, 2)),)).token_ids == (5,)


def test_logprobs_have_the_shape_that_was_asked_for() -> None:
    runner = small(script=total)
    sequences = (new(0, 1), new(1, 2, sampling=params(logprobs=3)), new(2, 3, sampling=params(logprobs=0)))
    rows = tuple(PrefillRow(s.slot, 0, s.token_ids, (s.slot + 1,), True) for s in sequences)
    result = run(runner, 0, new=sequences, prefills=rows)
    assert result.logprobs is not None
    none, three, zero = result.logprobs
    assert none is None
    assert three is not None
    assert three.top_ids[0] == 2
    assert len(three.top_ids) == len(three.top_logprobs) == 3
    assert three.top_logprobs[0] == three.logprob
    assert zero is not None
    assert zero.top_ids == ()


def test_copied_page_holds_the_same_tokens() -> None:
    runner = small(script=total)
    started(runner, 1, 2, 3, pages=(1, 2))
    row = PrefillRow(1, 2, (9,), (1, 5), True)
    assert run(runner, 1, copies=((2, 5),), new=(new(1, 1, 2, 9),), prefills=(row,)).token_ids == (12,)


def test_shared_page_may_be_read_but_not_written() -> None:
    runner = small(script=total)
    started(runner, 1, 2, 3, pages=(1, 2))
    row = PrefillRow(1, 2, (9,), (1, 3), True)
    assert run(runner, 1, new=(new(1, 1, 2, 9),), prefills=(row,)).token_ids == (12,)
    with pytest.raises(ContractError, match="page 1 is written by slot 2 while shared"):
        run(runner, 2, new=(new(2, 8),), prefills=(PrefillRow(2, 0, (8,), (1,), True),))


def test_shared_pages_must_hold_the_sequences_tokens() -> None:
    runner = small()
    started(runner, 1, 2, 3, pages=(1, 2))
    with pytest.raises(ContractError, match="shared pages hold other tokens"):
        run(runner, 1, new=(new(1, 7, 7, 9),), prefills=(PrefillRow(1, 2, (9,), (1, 3), True),))


VIOLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "decode position": ("the cache holds 3 tokens, the row says 4", {"decodes": (DecodeRow(0, 4, (1, 2, 3)),)}),
    "short table": ("too short", {"decodes": (DecodeRow(0, 3, (1,)),)}),
    "page 0": ("out of range", {"decodes": (DecodeRow(0, 3, (0, 2)),)}),
    "page out of range": ("out of range", {"decodes": (DecodeRow(0, 3, (1, 8)),)}),
    "swapped page": ("page 4 is written behind a gap", {"decodes": (DecodeRow(0, 3, (1, 4)),)}),
    "page twice": ("twice in one table", {"decodes": (DecodeRow(0, 3, (1, 1)),)}),
    "slot taken": ("without having been released", {"new": (new(0, 1),)}),
    "unknown slot": ("slot 3 holds no sequence", {"decodes": (DecodeRow(3, 0, (1,)),)}),
    "unknown slot released": ("slot 3 holds no sequence", {"released": (3,)}),
    "two rows": ("two rows", {"decodes": (DecodeRow(0, 3, (1, 2)),) * 2}),
    "row without its token": (
        "second row without its token",
        {"decodes": (DecodeRow(0, 3, (1, 2, 3), samples=False), DecodeRow(0, 4, (1, 2, 3)))},
    ),
    "token sampled and known": (
        "samples a token that another brings",
        {"decodes": (DecodeRow(0, 3, (1, 2, 3)), DecodeRow(0, 4, (1, 2, 3), token_id=9))},
    ),
    "token in place of the last": (
        "does not come next",
        {"decodes": (DecodeRow(0, 3, (1, 2, 3), token_id=9),)},
    ),
    "prefill after its end": ("after the prefill ended", {"prefills": (PrefillRow(0, 3, (1,), (1, 2), True),)}),
    "decode too early": (
        "before the prefill ended",
        {"new": (new(1, 5, 6),), "decodes": (DecodeRow(1, 0, (4,)),)},
    ),
    "chunk start": (
        "holds 0 tokens|nothing was written",
        {"new": (new(1, 5, 6),), "prefills": (PrefillRow(1, 1, (6,), (4,), True),)},
    ),
    "chunk tokens": (
        "other tokens",
        {"new": (new(1, 5, 6),), "prefills": (PrefillRow(1, 0, (6, 6), (4,), True),)},
    ),
    "samples": (
        "`samples`",
        {"new": (new(1, 5, 6),), "prefills": (PrefillRow(1, 0, (5, 6), (4,), False),)},
    ),
    "vocabulary": ("vocabulary", {"new": (new(1, 100),)}),
    "seed": ("seed", {"new": (new(1, 5, sampling=SamplingParams()),)}),
    "no room": ("max_model_len", {"new": (new(1, *range(32)),)}),
    "copy of nothing": ("never written", {"copies": ((6, 7),)}),
    "copy onto a page in use": ("while in use", {"copies": ((1, 2),)}),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_broken_promise_is_refused(name: str) -> None:
    message, orders = VIOLATIONS[name]
    runner = small()
    started(runner, 1, 2, 3)
    with pytest.raises(ContractError, match=message):
        runner.launch(Step(number=1, **orders))


def test_steps_are_numbered_upwards_and_collected_in_order() -> None:
    runner = small()
    first, second = runner.launch(Step(number=0)), runner.launch(Step(number=1))
    with pytest.raises(ContractError, match="launch order"):
        runner.collect(second)
    assert (runner.collect(first).number, runner.collect(second).number) == (0, 1)
    with pytest.raises(ContractError, match="step 1 after step 1"):
        runner.launch(Step(number=1))


def test_a_step_is_started_once_before_all_else() -> None:
    runner = small()
    first = runner.build(Step(number=0))
    for early in (lambda: runner.build(Step(number=1)), lambda: runner.collect(first)):
        with pytest.raises(ContractError, match=r"before .* was started"):
            early()
    first = (runner := small()).build(Step(number=0))
    runner.start(first)
    with pytest.raises(ContractError, match="started twice"):
        runner.start(first)
    second = runner.build(Step(number=1))
    with pytest.raises(ContractError, match="built last"):
        runner.start(first)
    assert runner.collect(first).number == 0, "a step that is built holds nobody up"
    runner.start(second)
    assert runner.collect(second).number == 1


def test_closed_runner_takes_no_step() -> None:
    runner = small()
    runner.close()
    with pytest.raises(ContractError, match="after close"):
        runner.launch(Step(number=0))


def test_step_reports_what_it_cost() -> None:
    runner = small(step_s=0.001)
    first, second = runner.launch(Step(number=0)), runner.launch(Step(number=1))
    assert runner.collect(first).elapsed_s == runner.collect(second).elapsed_s == 0.001


def test_factory_can_be_pickled_and_reports_progress() -> None:
    factory = pickle.loads(pickle.dumps(fake_factory(script=total, vocab_size=12)))  # noqa: S301
    told: list[tuple[str, float | None]] = []
    runner = factory(lambda text, fraction=None: told.append((text, fraction)))
    assert factory.runner is runner
    assert runner.info.vocab_size == 12
    assert told == [("fake model", 1.0)]
