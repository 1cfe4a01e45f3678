"""Counters that go on over engines."""

from __future__ import annotations

from typing import Any

from vllm_mlx.core.messages import DiskStats, Stats
from vllm_mlx.engine.totals import StatsTotals


def disk(number: int, **changes: Any) -> DiskStats:
    """Figures that are all `number`, but for the changes."""
    names = [name for name in DiskStats.__struct_fields__ if name not in ("num_refused", "problem")]
    return DiskStats(**{**dict.fromkeys(names, number), "num_refused": {}, **changes})


def test_counters_never_fall_when_an_engine_starts_from_zero() -> None:
    totals = StatsTotals()
    totals.update(Stats(num_steps=5, num_tokens=50, num_preemptions=1, num_evicted_pages=4, num_running=3))
    totals.update(Stats(num_steps=4, num_tokens=40))  # came late
    totals.engine_ended()
    assert totals.total == Stats(num_steps=5, num_tokens=50, num_preemptions=1, num_evicted_pages=4)
    totals.update(Stats(num_steps=2, num_tokens=20, num_evicted_pages=1, pages_used=7))
    assert totals.total == Stats(num_steps=7, num_tokens=70, num_preemptions=1, num_evicted_pages=5, pages_used=7)


def test_counts_of_the_disk_go_on_and_its_state_is_the_present_one() -> None:
    totals = StatsTotals()
    totals.update(Stats(disk=disk(3, num_refused={"known": 2, "paused": 1}, problem="full")))
    totals.engine_ended()
    between = disk(3, queued_bytes=0, ahead_bytes=0, num_refused={"known": 2, "paused": 1})
    assert totals.total.disk == between
    totals.update(Stats(disk=disk(1, num_refused={"known": 1})))
    summed = disk(4, num_blobs=1, size_bytes=1, queued_bytes=1, ahead_bytes=1)
    assert totals.total.disk == DiskStats(
        **{name: getattr(summed, name) for name in DiskStats.__struct_fields__ if name != "num_refused"},
        num_refused={"known": 3, "paused": 1},
    )


def test_report_of_the_disk_that_comes_late_is_ignored() -> None:
    totals = StatsTotals()
    totals.update(Stats(num_steps=5, disk=disk(3)))
    totals.update(Stats(num_steps=5, disk=disk(2)))
    assert totals.total.disk == disk(3)


def test_without_a_disk_there_are_no_figures() -> None:
    totals = StatsTotals()
    totals.update(Stats(num_steps=5))
    totals.engine_ended()
    assert totals.total.disk is None
