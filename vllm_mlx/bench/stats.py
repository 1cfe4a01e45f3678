"""Summaries of measured values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

PERCENTILES = (50, 90, 95, 99)


class Summary(NamedTuple):
    """Of a sample of values, in their own unit."""

    mean: float
    stddev: float
    """Of the sample; 0 for one value."""
    min: float
    max: float
    p50: float
    p90: float
    p95: float
    p99: float


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which `percent` % of `ordered` (ascending, not empty) lie, linear between neighbours.

    The estimator called R-7 (Hyndman and Fan, 1996), which numpy and spreadsheets use too.
    """
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(values: Sequence[float]) -> Summary | None:
    """All statistics; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return Summary(
        statistics.fmean(ordered),
        statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        ordered[0],
        ordered[-1],
        *(percentile(ordered, percent) for percent in PERCENTILES),
    )


def mean(values: Sequence[float]) -> float | None:
    """None without values."""
    return statistics.fmean(values) if values else None
