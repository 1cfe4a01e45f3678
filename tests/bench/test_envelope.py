"""Verdicts over cells."""

from __future__ import annotations

import pytest

from vllm_mlx.bench.envelope import Cell, CellMeasure, Objectives, judge, summarize_cells
from vllm_mlx.bench.sample import Failure, FailureKind, Sample


def sample(e2e_s: float = 1.0, *, cached: int | None = 0, failure: Failure | None = None) -> Sample:
    return Sample(
        started_s=0.0,
        e2e_s=e2e_s,
        ttft_s=e2e_s / 2,
        last_s=e2e_s,
        gaps_s=(e2e_s / 2,),
        num_chunks=2,
        usage_prompt_tokens=100,
        usage_completion_tokens=2,
        cached_tokens=cached,
        finish_reason="length",
        content="x",
        failure=failure,
    )


def verdict(
    *samples: Sample, mode: str = "cold", saved: float | None = None, **objectives: float
) -> tuple[str, list[str]]:
    measure = CellMeasure(list(samples), wall_s=2.0, tokens_saved=saved)
    row = judge(Cell(100, 2, mode, 1), measure, Objectives(**objectives))
    assert row["sustainable"] is (row["verdict"] == "sustainable")
    return row["verdict"], row["reasons"]


OOM = Failure(FailureKind.STATUS, "out of memory", 500)
TIMEOUT = Failure(FailureKind.TIMEOUT, "silent")


@pytest.mark.parametrize(
    ("objectives", "reason"),
    [
        ({"max_p95_ttft_ms": 499.0}, "p95 TTFT in ms 500 > 499"),
        ({"max_p95_chunk_gap_ms": 499.0}, "p95 chunk gap in ms 500 > 499"),
        ({"max_p95_e2e_ms": 999.0}, "p95 end to end in ms 1000 > 999"),
    ],
)
def test_limit_that_is_exceeded_is_named(objectives: dict[str, float], reason: str) -> None:
    assert verdict(sample(), **objectives) == ("exceeded", [reason])
    [(name, limit)] = objectives.items()
    assert verdict(sample(), **{name: limit + 1}) == ("sustainable", [])


def test_failures_are_counted_by_kind() -> None:
    assert verdict(sample(), sample(failure=OOM))[1] == ["failure rate 0.5 > 0", "out of memory 1 > 0"]
    assert verdict(sample(), sample(failure=TIMEOUT))[1] == ["failure rate 0.5 > 0", "timeouts 1 > 0"]
    assert verdict(sample(), sample(failure=OOM), max_failure_rate=0.5, max_ooms=1) == ("sustainable", [])
    assert "no request was answered" in verdict(sample(failure=OOM), max_failure_rate=1, max_ooms=9)[1]


@pytest.mark.parametrize(
    ("mode", "cached", "expected"),
    [
        ("cold", 0, "sustainable"),
        ("cold", 5, "sustainable"),
        ("cold", 60, "unverified"),
        ("prefix-miss", 60, "unverified"),
        ("warm", 96, "sustainable"),
        ("warm", 0, "unverified"),
        ("prefix-hit", 60, "sustainable"),
        ("prefix-hit", 30, "unverified"),
        ("cold", None, "unverified"),
        ("warm", None, "unverified"),
    ],
)
def test_cache_must_have_done_what_the_cell_is_about(mode: str, cached: int | None, expected: str) -> None:
    found, reasons = verdict(sample(cached=cached), mode=mode)
    assert found == expected
    assert bool(reasons) is (expected == "unverified")


def test_servers_counters_stand_in_for_usage() -> None:
    assert verdict(sample(cached=None), mode="warm", saved=90.0)[0] == "sustainable"
    assert verdict(sample(cached=None), mode="cold", saved=90.0)[0] == "unverified"


def test_output_must_be_the_baselines() -> None:
    measure = CellMeasure([sample()], wall_s=1.0, is_baseline_equal=False)
    row = judge(Cell(100, 2, "cold", 1), measure, Objectives())
    assert (row["verdict"], row["reasons"]) == ("exceeded", ["greedy output differs from the baseline's"])


def test_summary_names_the_most_clients_that_are_sustained() -> None:
    def cell(clients: int, e2e_s: float) -> dict[str, object]:
        measure = CellMeasure([sample(e2e_s)], wall_s=1.0)
        return judge(Cell(100, 2, "cold", clients), measure, Objectives(max_p95_e2e_ms=1500))

    [line] = summarize_cells([cell(1, 1.0), cell(4, 1.2), cell(8, 2.0)])
    assert (line["cache_mode"], line["max_sustainable_concurrency"]) == ("cold", 4)
    [line] = summarize_cells([cell(1, 2.0)])
    assert line["max_sustainable_concurrency"] is None
