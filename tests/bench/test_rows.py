"""Rows: figures that can be checked by hand."""

from __future__ import annotations

import pytest

from vllm_mlx.bench.rows import FIELDS, cache_fields, is_valid, measure
from vllm_mlx.bench.sample import Failure, FailureKind, Sample


def sample(ttft_s: float = 0.5, gaps_s: tuple[float, ...] = (0.1, 0.3), **changes: object) -> Sample:
    values: dict[str, object] = {
        "started_s": 0.0,
        "ttft_s": ttft_s,
        "gaps_s": gaps_s,
        "last_s": ttft_s + sum(gaps_s),
        "e2e_s": ttft_s + sum(gaps_s) + 0.1,
        "num_chunks": 1 + len(gaps_s),
        "usage_prompt_tokens": 10,
        "usage_completion_tokens": 5,
        "finish_reason": "length",
        "content": "text",
    }
    return Sample(**(values | changes))


FAILED = sample(failure=Failure(FailureKind.STATUS, "busy", 503))


def test_figures_of_two_requests() -> None:
    row = measure([sample(0.5), sample(1.5)], 2.0, validate=True)
    expected = {
        "num_requests": 2,
        "failures": 0,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "ttft_ms": 1000.0,
        "ttft_ms_min": 500.0,
        "ttft_ms_max": 1500.0,
        "ttft_ms_p50": 1000.0,
        "tpot_ms": 100.0,
        "itl_ms": 200.0,
        "itl_ms_max": 300.0,
        "gen_tps": 10.0,
        "prompt_tps": (10 / 0.5 + 10 / 1.5) / 2,
        "e2e_latency_ms": 1500.0,
        "throughput_tps": 5.0,
        "requests_per_s": 1.0,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["validated"] is True
    assert row["tokens_counted_by"] == "usage"
    assert set(row) <= set(FIELDS)


def test_failed_requests_count_as_failures_and_nothing_else() -> None:
    row = measure([sample(), FAILED, FAILED], 1.0, validate=True)
    assert (row["num_requests"], row["failures"], row["failure_kinds"]) == (3, 2, {"status 503": 2})
    assert row["throughput_tps"] == pytest.approx(5.0)
    assert row["ttft_ms"] == pytest.approx(500.0)
    assert row["validated"] is False


def test_without_an_answer_there_are_no_figures() -> None:
    row = measure([FAILED], 1.0, validate=True)
    names = ("ttft_ms", "tpot_ms", "itl_ms_p95", "gen_tps", "throughput_tps", "requests_per_s", "completion_tokens")
    assert [row[name] for name in names] == [None] * len(names)


@pytest.mark.parametrize(
    ("changes", "valid"),
    [({}, True), ({"content": " \n"}, False), ({"content": "", "reasoning": "hm"}, True)],
)
def test_answer_must_say_something(changes: dict[str, object], valid: bool) -> None:
    assert is_valid(sample(**changes)) is valid


def test_nothing_is_said_where_nothing_is_validated() -> None:
    assert measure([sample()], 1.0, validate=False)["validated"] is None


def test_cache_hit_rate() -> None:
    assert cache_fields({"x_cache_hits": 3.0, "x_cache_misses": 1.0})["cache_hit_rate"] == 0.75
    assert cache_fields({"x_total": 3.0}) == dict.fromkeys(
        ("cache_hits", "cache_misses", "cache_hit_rate", "tokens_saved")
    )
