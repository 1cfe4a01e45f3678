"""Who waits for whom is learned from rounds, and from no single one."""

from __future__ import annotations

from vllm_mlx.engine.overlap import Overlap


def test_the_next_step_is_launched_first_until_waiting_has_long_been_short() -> None:
    overlap = Overlap()
    for _ in range(5):
        overlap.observe(0.0, 0.01)
    assert not overlap.collects_first
    for _ in range(20):
        overlap.observe(0.0, 0.01)
    assert overlap.collects_first


def test_one_long_wait_changes_nothing_and_many_do() -> None:
    overlap = Overlap()
    for _ in range(40):
        overlap.observe(0.0005, 0.01)
    overlap.observe(0.01, 0.01)
    assert overlap.collects_first
    for _ in range(10):
        overlap.observe(0.006, 0.01)
    assert not overlap.collects_first


def test_rounds_that_took_no_time_are_passed_over() -> None:
    overlap = Overlap()
    for _ in range(40):
        overlap.observe(0.0, 0.0)
    assert not overlap.collects_first
