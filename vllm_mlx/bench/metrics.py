"""Prometheus counters before and after a load: what the server itself says happened."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Counters = Mapping[str, float]
"""`name{label="value"}` -> value: counters, and the sums and counts of histograms and summaries."""

_GROWING = {"counter": ("_total",), "histogram": ("_sum", "_count"), "summary": ("_sum", "_count")}
_HITS = "cache_hits"
_MISSES = "cache_misses"
_SAVED = ("cached_prompt_tokens", "prompt_tokens_cached", "tokens_saved")
_ALSO_GAUGES = (_HITS, _MISSES, *_SAVED)
"""Some servers export these counters as gauges."""
_NOT_OURS = ("process_", "python_")


def parse(text: str) -> Counters:
    """Everything that only grows. Text that is not Prometheus's gives nothing."""
    found: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            endings = _GROWING.get(family.type)
            for sample in family.samples:
                is_growing = endings is not None and sample.name.endswith(endings)
                if is_growing or _bare_name(sample.name).endswith(_ALSO_GAUGES):
                    found[_key(sample.name, sample.labels)] = sample.value
    except (ValueError, KeyError):
        return {}
    return found


def delta(before: Counters, after: Counters) -> Counters:
    """By how much each counter grew. One that fell belongs to a restarted server and counts from zero."""
    return {
        key: value - before.get(key, 0.0) if value >= before.get(key, 0.0) else value
        for key, value in after.items()
        if not key.startswith(_NOT_OURS)
    }


def changed(change: Counters) -> dict[str, float]:
    """A delta without the counters that stood still."""
    return {key: value for key, value in change.items() if value}


def cache_hits(change: Counters) -> float | None:
    """Prefix cache hits, where the server counts them."""
    return _sum(change, _HITS)


def cache_misses(change: Counters) -> float | None:
    """Prefix cache misses, where the server counts them."""
    return _sum(change, _MISSES)


def tokens_saved(change: Counters) -> float | None:
    """Prompt tokens found in a cache, where the server counts them."""
    return _sum(change, *_SAVED)


def _sum(change: Counters, *endings: str) -> float | None:
    values = [value for key, value in change.items() if _bare_name(key).endswith(endings)]
    return sum(values) if values else None


def _bare_name(key: str) -> str:
    return key.partition("{")[0].removesuffix("_total")


def _key(name: str, labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{inside}}}" if inside else name
