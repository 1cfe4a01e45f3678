"""The capacity envelope's cells: what is measured in each, and whether the server sustains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_mlx.bench.rows import Row, distributions
from vllm_mlx.bench.sample import FailureKind, Sample
from vllm_mlx.bench.stats import Summary, mean

CACHE_MODES = ("cold", "warm", "prefix-hit", "prefix-miss")
"""Cache emptied before; the same prompts seen before; a long beginning seen before; nothing seen before."""
MAX_MISSED = 0.1
"""At most this part of a prompt may come from a cache where none should: templates begin all prompts alike."""
MIN_HIT = 0.5
"""At least this part must, where it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What a sustainable cell must keep; None: not asked."""

    max_p95_ttft_ms: float | None = None
    max_p95_chunk_gap_ms: float | None = None
    max_p95_e2e_ms: float | None = None
    max_failure_rate: float = 0.0
    max_ooms: int = 0
    max_timeouts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityOptions:
    """The sweep."""

    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    prompt_tokens: tuple[int, ...] = (256, 2048, 8192, 32768)
    output_tokens: tuple[int, ...] = (128, 512)
    cache_modes: tuple[str, ...] = CACHE_MODES
    repetitions: int = 3
    warmup: int = 1
    baseline_url: str | None = None
    objectives: Objectives = Objectives()


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    prompt_tokens: int
    output_tokens: int
    cache_mode: str
    concurrency: int

    @property
    def name(self) -> str:
        """Unique in a sweep."""
        return f"{self.prompt_tokens} in, {self.output_tokens} out, {self.cache_mode}, {self.concurrency} at once"


@dataclass(slots=True)
class CellMeasure:
    """What a cell's repetitions gave."""

    samples: list[Sample]
    wall_s: float = 0.0
    tokens_saved: float | None = None
    """As the server's counters say; None if it has none."""
    is_baseline_equal: bool | None = None
    """Whether greedy output equals the baseline's; None: not compared."""


def judge(cell: Cell, measure: CellMeasure, objectives: Objectives) -> Row:
    """A cell's figures and its verdict: 'sustainable', 'exceeded', or 'unverified'.

    Unverified: the limits are kept, but the cache was not in its mode, or nobody knows.
    """
    samples, good = measure.samples, [sample for sample in measure.samples if sample.is_ok]
    spread = distributions(good)
    failures = [sample.failure for sample in samples if sample.failure]
    cached = cached_fraction(measure)
    is_verified = verify_cache_mode(cell.cache_mode, cached)
    row: Row = {
        "prompt_tokens_requested": cell.prompt_tokens,
        "output_tokens_requested": cell.output_tokens,
        "cache_mode": cell.cache_mode,
        "concurrency": cell.concurrency,
        "num_requests": len(samples),
        "failures": len(failures),
        "failure_rate": len(failures) / len(samples) if samples else None,
        "ooms": sum(failure.is_out_of_memory for failure in failures),
        "timeouts": sum(failure.kind is FailureKind.TIMEOUT for failure in failures),
        "prompt_tokens": mean([s.usage_prompt_tokens for s in good if s.usage_prompt_tokens is not None]),
        "completion_tokens": mean([sample.completion_tokens for sample in good]),
        "cached_fraction": cached,
        "cache_verified": is_verified,
        "baseline_equal": measure.is_baseline_equal,
        "ttft_ms": _as_dict(spread["ttft_ms"]),
        "tpot_ms": _as_dict(spread["tpot_ms"]),
        "chunk_gap_ms": _as_dict(spread["itl_ms"]),
        "e2e_latency_ms": _as_dict(spread["e2e_latency_ms"]),
        "throughput_tps": sum(s.completion_tokens for s in good) / measure.wall_s if measure.wall_s else None,
        "requests_per_s": len(good) / measure.wall_s if measure.wall_s else None,
    }
    reasons = exceeded(row, objectives)
    verdict = "exceeded" if reasons else "sustainable" if is_verified else "unverified"
    if is_verified is None:
        reasons.append("the server does not say what came from its cache")
    elif not is_verified and cached is not None:
        reasons.append(f"not {cell.cache_mode}: {cached:.0%} of the prompts came from a cache")
    return row | {"verdict": verdict, "sustainable": verdict == "sustainable", "reasons": reasons}


def exceeded(row: Row, objectives: Objectives) -> list[str]:
    """Everything that a cell does not keep."""
    limits = (
        ("failure rate", row["failure_rate"], objectives.max_failure_rate),
        ("out of memory", row["ooms"], objectives.max_ooms),
        ("timeouts", row["timeouts"], objectives.max_timeouts),
        ("p95 TTFT in ms", _p95(row["ttft_ms"]), objectives.max_p95_ttft_ms),
        ("p95 chunk gap in ms", _p95(row["chunk_gap_ms"]), objectives.max_p95_chunk_gap_ms),
        ("p95 end to end in ms", _p95(row["e2e_latency_ms"]), objectives.max_p95_e2e_ms),
    )
    found = [
        f"{name} {value:.4g} > {limit:g}"
        for name, value, limit in limits
        if limit is not None and value is not None and value > limit
    ]
    if not row["num_requests"] or row["failures"] == row["num_requests"]:
        found.append("no request was answered")
    if row["baseline_equal"] is False:
        found.append("greedy output differs from the baseline's")
    return found


def cached_fraction(measure: CellMeasure) -> float | None:
    """Part of the prompts that was not computed: from each answer's usage, else from the server's counters."""
    good = [sample for sample in measure.samples if sample.is_ok and sample.usage_prompt_tokens]
    total = sum(sample.usage_prompt_tokens or 0 for sample in good)
    if not total:
        return None
    told = [sample.cached_tokens for sample in good if sample.cached_tokens is not None]
    if told:
        return sum(told) / total
    return None if measure.tokens_saved is None else measure.tokens_saved / total


def verify_cache_mode(mode: str, cached: float | None) -> bool | None:
    """Whether the cache did what the mode is about; None if nobody knows."""
    if cached is None:
        return None
    return cached >= MIN_HIT if mode in ("warm", "prefix-hit") else cached <= MAX_MISSED


def summarize_cells(cells: Sequence[Row]) -> list[Row]:
    """For each prompt length, output length and cache mode: the most clients that the server sustains."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for cell in cells:
        key = (cell["prompt_tokens_requested"], cell["output_tokens_requested"], cell["cache_mode"])
        groups.setdefault(key, []).append(cell)
    return [
        {
            "prompt_tokens_requested": prompt,
            "output_tokens_requested": output,
            "cache_mode": mode,
            "max_sustainable_concurrency": max((c["concurrency"] for c in group if c["sustainable"]), default=None),
            "max_unverified_concurrency": max(
                (c["concurrency"] for c in group if c["verdict"] == "unverified"), default=None
            ),
            "best_throughput_tps": max((c["throughput_tps"] or 0.0 for c in group), default=None),
        }
        for (prompt, output, mode), group in groups.items()
    ]


def _as_dict(summary: Summary | None) -> dict[str, float] | None:
    return None if summary is None else summary._asdict()


def _p95(summary: dict[str, float] | None) -> float | None:
    return None if summary is None else summary["p95"]
