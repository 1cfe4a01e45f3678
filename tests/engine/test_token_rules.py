"""What lists of tokens leave to choose from."""

from __future__ import annotations

from collections import deque

import pytest

from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.token_rules import TokenRules

VOCAB_SIZE = 20
ALL = (1 << VOCAB_SIZE) - 1


def left(output: tuple[int, ...] = (), **lists: object) -> set[int]:
    rules = TokenRules(SamplingParams(**lists), vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]
    found = rules.left(ALL, tuple(deque(output, maxlen=rules.num_remembered)))
    return {token for token in range(VOCAB_SIZE) if found >> token & 1}


@pytest.mark.parametrize(
    ("output", "forbidden"),
    [((), {4}), ((1,), {4}), ((1, 2), {4, 3}), ((2, 1, 2), {4, 3, 9}), ((2, 2), {4}), ((3, 2, 1), {4})],
)
def test_words_forbid_their_last_token_behind_the_others(output: tuple[int, ...], forbidden: set[int]) -> None:
    words = ((4,), (1, 2, 3), (2, 1, 2, 9))
    assert set(range(VOCAB_SIZE)) - left(output, bad_word_ids=words) == forbidden


def test_lists_narrow_each_other() -> None:
    assert left(allowed_token_ids=(3, 4, 19), bad_word_ids=((4,),)) == {3, 19}
    assert left(allowed_token_ids=(4,), bad_word_ids=((4,),)) == set()


def test_ends_are_withheld_until_there_are_enough_tokens_or_no_others() -> None:
    rules = TokenRules(SamplingParams(stop_token_ids=(0, 1), min_tokens=3), vocab_size=VOCAB_SIZE)
    assert rules.not_yet_ending(0b111, num_output=2) == 0b100
    assert rules.not_yet_ending(0b111, num_output=3) == 0b111
    assert rules.not_yet_ending(0b011, num_output=0) == 0b011


@pytest.mark.parametrize(
    ("lists", "silent"),
    [({}, True), ({"min_tokens": 5}, True), ({"min_tokens": 6}, False), ({"bad_word_ids": ((1,),)}, False)],
)
def test_rules_without_lists_are_silent_once_there_are_enough_tokens(lists: dict[str, object], silent: bool) -> None:
    rules = TokenRules(SamplingParams(**lists), vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]
    assert rules.are_silent(num_output=5) is silent
