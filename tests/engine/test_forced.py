"""Tokens without a choice are appended, several to a step; no token changes by that."""

from __future__ import annotations

from typing import Any

import pytest
from forcing import Loop, ScriptMatcher

from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import FinishReason, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.constraints import Constraint
from vllm_mlx.engine.token_rules import TokenRules
from vllm_mlx.testing.fake import FakeRunner

VOCAB_SIZE, END = 40, 1
FORCED = (11, 12, 13, 14, 15)
SCRIPT = "? 11 12 13 14 15 ? 21 ? ?"


class Engine(Loop):
    """Over a runner without a model."""

    def __init__(self, *, chunked: bool = True, num_pages: int = 64, **settings: Any) -> None:
        runner = FakeRunner(
            vocab_size=VOCAB_SIZE, num_pages=num_pages, page_size=4, max_model_len=64, chunked_decode=chunked
        )
        super().__init__(runner, Config(**{"max_num_seqs": 8, "prefix_cache": False, **settings}), end=END)


def submit(name: str = "a", script: str | None = SCRIPT, **given: Any) -> Submit:
    resume = given.pop("resume", ())
    sampling = SamplingParams(**{"seed": 1, "max_tokens": 30, "stop_token_ids": (END,), "grammar": script, **given})
    return Submit(name, Prompt((5, 6, 7, ord(name[0]) % VOCAB_SIZE)), sampling, resume_token_ids=resume)


def test_forced_tokens_are_computed_in_one_step_and_only_the_last_is_sampled() -> None:
    engine = Engine()
    tokens = engine.run(submit())["a"]
    assert tokens[1:6] == FORCED
    assert tokens[-1] == END
    assert len(tokens) == 11
    [chunk] = [step.decodes for step in engine.steps if len(step.decodes) > 1]
    assert [row.token_id for row in chunk] == [None, *FORCED[1:]]
    assert [row.position for row in chunk] == [5, 6, 7, 8, 9]
    assert [row.samples for row in chunk] == [False] * 4 + [True]


def test_forced_tokens_are_told_together() -> None:
    engine = Engine()
    engine.run(submit())
    assert [output.token_ids for output in engine.outputs if len(output.token_ids) > 1] == [FORCED]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_a_model_that_cannot(temperature: float) -> None:
    submits = [submit("a", temperature=temperature), submit("b", None), submit("c", "2 2 2 ? 3 3", seed=4)]
    one_by_one = Engine(chunked=False)
    expected = one_by_one.run(*submits)
    assert set(one_by_one.num_rows) <= {1, 2, 3}
    assert Engine().run(*submits) == expected


def test_rows_of_others_come_first() -> None:
    engine = Engine(max_num_seqs=3)
    others = [submit("b", None, max_tokens=12), submit("c", None, max_tokens=12)]
    expected = Engine(chunked=False).run(submit(), *others)
    assert engine.run(submit(), *others) == expected
    assert max(engine.num_rows) == 3
    engine = Engine(max_num_seqs=4)
    assert engine.run(submit(), *others) == expected
    assert max(engine.num_rows) == 4


@pytest.mark.parametrize(("max_tokens", "length"), [(3, 3), (6, 6), (7, 7)])
def test_max_tokens_may_fall_among_forced_ones(max_tokens: int, length: int) -> None:
    engine = Engine()
    tokens = engine.run(submit(max_tokens=max_tokens))["a"]
    assert len(tokens) == length
    assert tokens[1:] == (*FORCED, tokens[-1])[: length - 1]
    assert engine.finish is FinishReason.LENGTH


def test_stop_token_among_forced_ones_ends_the_sequence() -> None:
    engine = Engine()
    assert engine.run(submit(stop_token_ids=(13,)))["a"][1:] == (11, 12, 13)
    assert engine.finish is FinishReason.STOP


def test_a_forced_end_is_the_end() -> None:
    engine = Engine()
    assert engine.run(submit(script="? 11 12"))["a"][1:] == (11, 12, END)
    assert engine.finish is FinishReason.STOP


@pytest.mark.parametrize("given", [{"logprobs": 1}, {"bad_word_ids": ((30,),)}, {"min_tokens": 20}])
def test_who_looks_at_one_token_at_a_time_gets_one_at_a_time(given: dict[str, Any]) -> None:
    engine = Engine()
    tokens = engine.run(submit(**given))["a"]
    assert tokens[1:6] == FORCED
    assert set(engine.num_rows) == {1}
    assert all(len(output.logprobs or ()) == len(output.token_ids) for output in engine.outputs if "logprobs" in given)


@pytest.mark.parametrize(
    ("script", "allowed", "forced"),
    [
        ([3, 4, 5], (3,), (4, 5, END)),
        ([3, 4, 36, 5], (3,), (4,)),
        ([3, 4, 5], (3, 4), ()),
        ([3, 4, 5], (4,), ()),
        ([None, 4, 5], (3,), ()),
    ],
    ids=["all", "not in the model", "a choice", "another mask", "a gap"],
)
def test_what_follows_is_known_where_a_mask_has_one_bit(
    script: list[int | None], allowed: tuple[int, ...], forced: tuple[int, ...]
) -> None:
    constraint = Constraint(None, TokenRules(SamplingParams(), vocab_size=36), ())
    row = sum(1 << token for token in allowed).to_bytes(8, "little")
    constraint.force(ScriptMatcher(script, vocab_size=VOCAB_SIZE, end=END), row, vocab_size=36)
    assert constraint.forced == forced


def test_pages_that_are_missing_make_rows_wait_but_preempt_nobody() -> None:
    engine = Engine(num_pages=4)
    assert engine.run(submit(max_tokens=8))["a"][1:6] == FORCED
    engine = Engine(num_pages=7)
    found = engine.run(submit("a", max_tokens=8), submit("b", max_tokens=8))
    assert engine.scheduler.stats().num_preemptions == 0
    assert [tokens[1:6] for tokens in found.values()] == [FORCED] * 2


def test_resumed_amid_forced_tokens() -> None:
    whole = Engine().run(submit())["a"]
    for count in range(1, len(whole)):
        assert Engine().run(submit(resume=whole[:count]))["a"] == whole[count:]
