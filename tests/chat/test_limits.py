"""What a request may ask for."""

from __future__ import annotations

import re

import pytest

from vllm_mlx.chat.limits import check_text, check_token_ids, choice_seeds, max_output_tokens
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.errors import ContextLengthExceeded, InvalidRequest
from vllm_mlx.core.sampling import SamplingParams


def limit(*, num_prompt: int, default: int = 50, **sampling: int) -> int:
    return max_output_tokens(
        SamplingParams(**sampling), num_prompt=num_prompt, max_model_len=100, default=default, param="prompt"
    )


def test_output_has_the_room_that_the_prompt_leaves() -> None:
    assert limit(num_prompt=10) == 50
    assert limit(num_prompt=70) == 30
    assert limit(num_prompt=99) == 1
    assert limit(num_prompt=90, max_tokens=10) == 10


def test_prompt_without_room_is_refused() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"is 100 tokens,.*prompt has 100 tokens") as caught:
        limit(num_prompt=100)
    assert caught.value.param == "prompt"


def test_prompt_and_output_together_are_refused() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"is 100 tokens,.*has 95.*asks for 6.*at most 5"):
        limit(num_prompt=95, max_tokens=6)


def test_agents_know_what_is_too_long() -> None:
    """Clients look for these words, at least one of each row, before they compact a conversation."""
    recognised = {
        "Claude Code": ("prompt is too long", "maximum context length"),
        "OpenCode": (r"maximum context length is \d+ tokens",),
        "litellm": ("This model's maximum context length is",),
    }
    for sampling in ({}, {"max_tokens": 50}):
        with pytest.raises(ContextLengthExceeded) as caught:
            limit(num_prompt=60 if sampling else 100, **sampling)
        assert caught.value.code == "context_length_exceeded"
        for patterns in recognised.values():
            assert any(re.search(pattern, caught.value.message) for pattern in patterns)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        limit(num_prompt=0)


def test_min_tokens_must_be_reachable() -> None:
    assert limit(num_prompt=1, max_tokens=5, min_tokens=5) == 5
    with pytest.raises(InvalidRequest) as caught:
        limit(num_prompt=1, max_tokens=5, min_tokens=6)
    assert caught.value.param == "min_tokens"


def test_hopeless_text_is_refused_by_its_size(byte_level: Tokenizer) -> None:
    text = "a" * (100 * byte_level.max_token_bytes)
    check_text(text, byte_level, max_model_len=100, param="prompt")
    with pytest.raises(ContextLengthExceeded, match=r"is 100 tokens,.*at least 101"):
        check_text(text + "a" * byte_level.max_token_bytes, byte_level, max_model_len=100, param="prompt")


def test_half_a_surrogate_pair_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        check_text("a\ud800", byte_level, max_model_len=100, param="prompt")


@pytest.mark.parametrize("token_ids", [(0, 10), (-1, 3)])
def test_id_outside_the_vocabulary_is_named(token_ids: tuple[int, ...]) -> None:
    wrong = next(i for i in token_ids if i in (10, -1))
    with pytest.raises(InvalidRequest, match=rf"Token id {wrong} .* 0 to 9") as caught:
        check_token_ids(token_ids, vocab_size=10, param="logit_bias.{}")
    assert caught.value.param == f"logit_bias.{wrong}"


def test_seeds_of_choices_differ_and_repeat() -> None:
    seeds = choice_seeds(7, 64)
    assert seeds[0] == 7
    assert len(set(seeds)) == 64
    assert choice_seeds(7, 3) == seeds[:3]
    assert choice_seeds(8, 2)[1] != seeds[1]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_unseeded_requests_draw_their_seeds() -> None:
    assert len(set(choice_seeds(None, 8))) == 8
    assert choice_seeds(None, 1) != choice_seeds(None, 1)
