"""Comparisons: which way is better, and what is not in both."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.bench import capacity, cases, compare, sweep
from vllm_mlx.core.errors import ConfigError


def swept(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"kind": sweep.KIND, "summary": list(rows)}


def row(concurrency: int = 1, **figures: float | None) -> dict[str, Any]:
    return {"prompt_set": "short", "concurrency": concurrency, "max_tokens": 8, "extra_body": {"a": [1]}, **figures}


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict", "ratio"),
    [
        ("ttft_ms", 100.0, 50.0, "better", 0.5),
        ("ttft_ms", 100.0, 150.0, "worse", 1.5),
        ("throughput_tps", 100.0, 150.0, "better", 1.5),
        ("throughput_tps", 100.0, 50.0, "worse", 0.5),
        ("throughput_tps", 100.0, 101.0, "same", 1.01),
        ("failures", 0.0, 3.0, "worse", None),
        ("failures", 3.0, 0.0, "better", 0.0),
        ("failures", 0.0, 0.0, "same", None),
    ],
)
def test_better_and_worse(metric: str, before: float, after: float, verdict: str, ratio: float | None) -> None:
    [change] = compare.compare(swept(row(**{metric: before})), swept(row(**{metric: after}))).changes
    assert (change.metric, change.verdict, change.ratio) == (metric, verdict, ratio)


def test_only_equal_configurations_are_compared() -> None:
    found = compare.compare(swept(row(1, ttft_ms=1), row(4, ttft_ms=2)), swept(row(4, ttft_ms=3), row(8, ttft_ms=4)))
    assert [(change.before, change.after) for change in found.changes] == [(2, 3)]
    assert found.only_before == ['short, concurrency 1, max_tokens 8, extra_body {"a": [1]}']
    assert found.only_after == ['short, concurrency 8, max_tokens 8, extra_body {"a": [1]}']


def test_figures_that_one_lacks_are_left_out() -> None:
    found = compare.compare(swept(row(ttft_ms=None, gen_tps=5.0)), swept(row(ttft_ms=3.0, gen_tps=6.0)))
    assert [change.metric for change in found.changes] == ["gen_tps"]


def test_workloads_are_compared_by_case() -> None:
    def records(*e2e_ms: float, ok: bool) -> dict[str, Any]:
        each = [{"workload": "w", "case_id": "c", "ok": ok, "metrics": {"e2e_latency_ms": value}} for value in e2e_ms]
        return {"kind": cases.KIND, "records": each}

    changes = compare.compare(records(10, 20, ok=True), records(30, ok=False)).changes
    assert [(c.metric, c.before, c.after, c.verdict) for c in changes] == [
        ("e2e_latency_ms", 15, 30, "worse"),
        ("ok", 1, 0, "worse"),
    ]


def test_envelopes_are_compared_by_cell() -> None:
    def cells(p95: float) -> dict[str, Any]:
        keys = {"prompt_tokens_requested": 64, "output_tokens_requested": 8, "cache_mode": "cold", "concurrency": 2}
        spread = {"ttft_ms": {"p95": p95, "mean": 1.0}, "chunk_gap_ms": None, "e2e_latency_ms": {"p95": 4.0}}
        return {"kind": capacity.KIND, "cells": [keys | spread | {"failures": 0}]}

    changes = {change.metric: change for change in compare.compare(cells(10), cells(5)).changes}
    assert changes["ttft_ms_p95"].verdict == "better"
    assert changes["e2e_latency_ms_p95"].verdict == "same"


def test_table_has_a_sign_for_each_figure() -> None:
    text = io.StringIO()
    found = compare.compare(swept(row(ttft_ms=10, gen_tps=4), row(2)), swept(row(ttft_ms=20, gen_tps=8)))
    compare.write(found, text)
    assert 'short, concurrency 1, max_tokens 8, extra_body {"a": [1]}' in text.getvalue()
    assert "2.00 x  ▼ worse" in text.getvalue()
    assert "2.00 x  ▲ better" in text.getvalue()
    assert "only in A: short, concurrency 2" in text.getvalue()


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    for name, text in (("a", "[1]"), ("b", '{"kind": "other"}'), ("c", "x"), ("d", '{"kind": ["x"]}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=rf"^compare: .*/{name} "):
            compare.load(tmp_path / name)
    (tmp_path / "good").write_text(json.dumps(swept(row())))
    assert compare.load(tmp_path / "good") == swept(row())
    with pytest.raises(ConfigError, match="different kinds"):
        compare.compare(swept(), {"kind": cases.KIND, "records": []})
