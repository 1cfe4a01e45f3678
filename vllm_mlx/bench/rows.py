"""One row of results: a configuration and one repetition of it, or all its repetitions together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vllm_mlx.bench import metrics
from vllm_mlx.bench.sample import Sample
from vllm_mlx.bench.stats import Summary, mean, summarize

Row = dict[str, Any]

IDENTITY = ("run_id", "timestamp", "tag")
SERVER = (
    *("chip", "gpu_cores", "memory_gb", "bandwidth_gbs", "os_version"),
    *("model_id", "model_type", "engine_type", "mtp_enabled", "specprefill", "kv_quant", "cache_type"),
    *("backend", "dtype", "server_version"),
)
CONFIGURATION = (
    *("prompt_set", "concurrency", "max_tokens", "enable_thinking", "extra_body"),
    *("request_rate", "endpoint"),
)
"""Equal in rows that can be compared."""
DISTRIBUTIONS = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_latency_ms")
"""Fields whose plain name is the mean, and which have columns for the other statistics too."""
STATISTICS = tuple(name for name in Summary._fields if name != "mean")
MEASURES = (
    *("repetition", "prompt_tokens", "completion_tokens", "ttft_ms", "tpot_ms", "itl_ms", "e2e_latency_ms"),
    *("gen_tps", "prompt_tps", "throughput_tps", "requests_per_s"),
    *("metal_active_gb", "metal_peak_gb", "metal_cache_gb"),
    *("cache_hits", "cache_misses", "cache_hit_rate", "tokens_saved", "validated"),
    *("num_requests", "failures", "failure_kinds", "finish_reasons", "tokens_counted_by", "wall_s", "complete"),
    *(f"{name}_{statistic}" for name in DISTRIBUTIONS for statistic in STATISTICS),
    "metrics_delta",
)
FIELDS = (*IDENTITY, *SERVER, *CONFIGURATION, *MEASURES)
"""Every column, in order."""

_MS = 1000.0


def measure(samples: Sequence[Sample], wall_s: float, *, validate: bool) -> Row:
    """Everything that the client measured. Rates count complete answers only, over the time of the whole load."""
    good = [sample for sample in samples if sample.is_ok]
    tokens = sum(sample.completion_tokens for sample in good)
    row: Row = {
        "num_requests": len(samples),
        "failures": len(samples) - len(good),
        "failure_kinds": dict(Counter(sample.failure.label for sample in samples if sample.failure)),
        "finish_reasons": dict(Counter(sample.finish_reason for sample in good)),
        "tokens_counted_by": "+".join(sorted({sample.counted_by for sample in good})) or None,
        "wall_s": wall_s,
        "prompt_tokens": mean(_present(good, lambda s: s.usage_prompt_tokens)),
        "completion_tokens": mean([sample.completion_tokens for sample in good]),
        "gen_tps": mean(_present(good, lambda s: s.decode_tokens_per_s)),
        "prompt_tps": mean(_present(good, lambda s: s.prompt_tokens_per_s)),
        "throughput_tps": tokens / wall_s if wall_s and good else None,
        "requests_per_s": len(good) / wall_s if wall_s and good else None,
        "validated": all(map(is_valid, samples)) if validate and samples else None,
    }
    for name, summary in distributions(good).items():
        row[name] = summary.mean if summary else None
        row |= {f"{name}_{statistic}": getattr(summary, statistic, None) for statistic in STATISTICS}
    return row


def distributions(good: Sequence[Sample]) -> dict[str, Summary | None]:
    """Statistics of `DISTRIBUTIONS`, in milliseconds. Chunk gaps are of all requests together."""
    return {
        "ttft_ms": summarize([_MS * value for value in _present(good, lambda s: s.ttft_s)]),
        "tpot_ms": summarize([_MS * value for value in _present(good, lambda s: s.tpot_s)]),
        "itl_ms": summarize([_MS * gap for sample in good for gap in sample.gaps_s]),
        "e2e_latency_ms": summarize([_MS * sample.e2e_s for sample in good]),
    }


def is_valid(sample: Sample) -> bool:
    """Whether an answer is complete and says something."""
    return sample.is_ok and bool(sample.content.strip() or sample.reasoning.strip() or sample.tool_calls)


def cache_fields(change: metrics.Counters) -> Row:
    """What the server counted of its prefix cache; absent where it counts nothing."""
    hits, misses = metrics.cache_hits(change), metrics.cache_misses(change)
    looked_up = (hits or 0.0) + (misses or 0.0)
    return {
        "cache_hits": hits,
        "cache_misses": misses,
        "cache_hit_rate": (hits or 0.0) / looked_up if looked_up else None,
        "tokens_saved": metrics.tokens_saved(change),
    }


def request_record(sample: Sample) -> Row:
    """One request, for the JSON output."""
    return {
        "started_s": sample.started_s,
        "ttft_ms": _ms(sample.ttft_s),
        "tpot_ms": _ms(sample.tpot_s),
        "e2e_latency_ms": _ms(sample.e2e_s),
        "prompt_tokens": sample.usage_prompt_tokens,
        "completion_tokens": sample.completion_tokens,
        "cached_tokens": sample.cached_tokens,
        "tokens_counted_by": sample.counted_by,
        "finish_reason": sample.finish_reason,
        "failure": sample.failure.label if sample.failure else None,
        "message": sample.failure.message if sample.failure else None,
    }


def _present(samples: Sequence[Sample], get: Callable[[Sample], float | None]) -> list[float]:
    return [value for sample in samples if (value := get(sample)) is not None]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else _MS * seconds
