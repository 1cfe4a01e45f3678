"""Statistics, against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mlx.bench.stats import percentile, summarize

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(VALUES, st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


@given(VALUES.filter(lambda values: len(values) > 1))
def test_summary_is_numpys(values: list[float]) -> None:
    found = summarize(values)
    expected = [np.mean(values), np.std(values, ddof=1), min(values), max(values)]
    expected += [np.percentile(values, p) for p in (50, 90, 95, 99)]
    assert list(found) == pytest.approx(expected, rel=1e-9, abs=1e-5)


def test_one_value_has_no_spread_and_none_has_no_summary() -> None:
    assert summarize([3.0]) == (3.0, 0.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0)
    assert summarize([]) is None
