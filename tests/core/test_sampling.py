"""Sampling parameters are refused when the engine could not compute with them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.sampling import SamplingParams

WHOLE = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [1.5, 2.0, True, "2", math.nan, math.inf])
def test_a_count_that_is_no_whole_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [*WHOLE, "temperature", "top_p", "min_p", "frequency_penalty"])
@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["high", "low"])
def test_a_number_too_large_for_a_float_is_out_of_range(name: str, value: int) -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("given", [{"logit_bias": {1.5: 1.0}}, {"stop_token_ids": (2.5,)}])
def test_a_token_id_that_is_no_whole_number_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="whole number"):
        SamplingParams(**given)


def test_the_extreme_values_are_accepted() -> None:
    SamplingParams(seed=-(2**63), top_k=-1, min_p=1, temperature=0, top_p=1)
    SamplingParams(seed=2**64 - 1, top_k=2**31 - 1, logit_bias={0: -100, 1: 100}, logprobs=0)
