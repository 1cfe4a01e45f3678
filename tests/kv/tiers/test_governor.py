"""The write budget and the switch."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_tier import Clock
from filelock import FileLock

from vllm_mlx.kv.tiers.governor import DailyBudget, WriteSwitch

DAY_S = 86_400.0


@pytest.fixture
def clock() -> Clock:
    return Clock(20_000 * DAY_S)


def test_budget_ends_and_returns_at_midnight(tmp_path: Path, clock: Clock) -> None:
    budget = DailyBudget(tmp_path / "written.json", max_bytes=100, clock=clock)
    clock.now += DAY_S - 1
    budget.spend(60)
    assert budget.allows(40)
    assert not budget.allows(41)
    clock.now += 1
    assert budget.allows(100)
    budget.spend(100)
    assert not budget.allows(1)


def test_budget_survives_a_restart_of_the_same_day(tmp_path: Path, clock: Clock) -> None:
    first = DailyBudget(tmp_path / "written.json", max_bytes=100, clock=clock)
    first.spend(70)
    first.persist()
    second = DailyBudget(tmp_path / "written.json", max_bytes=100, clock=clock)
    second.persist()
    assert not second.allows(31)
    clock.now += DAY_S
    third = DailyBudget(tmp_path / "written.json", max_bytes=100, clock=clock)
    third.persist()
    assert third.allows(100)


def test_servers_of_one_folder_share_the_budget(tmp_path: Path, clock: Clock) -> None:
    one, two = (DailyBudget(tmp_path / "written.json", max_bytes=100, clock=clock) for _ in range(2))
    one.spend(30)
    two.spend(40)
    one.persist()
    two.persist()
    one.persist()
    assert [budget.allows(31) for budget in (one, two)] == [False, False]
    assert [budget.allows(30) for budget in (one, two)] == [True, True]


def test_much_is_persisted_without_being_told(tmp_path: Path, clock: Clock) -> None:
    budget = DailyBudget(tmp_path / "written.json", max_bytes=None, clock=clock)
    budget.spend((64 << 20) - 1)
    assert not (tmp_path / "written.json").exists()
    budget.spend(1)
    assert (tmp_path / "written.json").read_text() == '{"day": 20000, "bytes": 67108864}'


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"day": 20000, "bytes": "many"}', '{"day": 20000, "bytes": -5}']
)
def test_broken_budget_file_counts_as_empty(tmp_path: Path, clock: Clock, content: str) -> None:
    (tmp_path / "written.json").write_text(content)
    budget = DailyBudget(tmp_path / "written.json", max_bytes=100, clock=clock)
    budget.spend(10)
    budget.persist()
    assert budget.allows(90)
    assert (tmp_path / "written.json").read_text() == '{"day": 20000, "bytes": 10}'


def test_budget_waits_for_no_lock_and_loses_nothing(tmp_path: Path, clock: Clock) -> None:
    budget = DailyBudget(tmp_path / "written.json", max_bytes=100, clock=clock)
    budget.spend(10)
    with FileLock(tmp_path / "written.lock"):
        budget.persist()
    assert not (tmp_path / "written.json").exists()
    budget.persist()
    assert '"bytes": 10' in (tmp_path / "written.json").read_text()


def test_budget_counts_without_a_disk(tmp_path: Path, clock: Clock) -> None:
    budget = DailyBudget(tmp_path / "absent" / "file" / "written.json", max_bytes=100, clock=clock)
    (tmp_path / "absent").write_text("no folder")
    budget.spend(90)
    budget.persist()
    assert not budget.allows(11)


def test_switch_waits_longer_after_every_failure(clock: Clock) -> None:
    switch = WriteSwitch(clock=clock, min_wait_s=5, max_wait_s=18)
    waits = []
    for _ in range(4):
        waits.append(switch.fail("disk full"))
        assert not switch.is_on
        clock.now += waits[-1]
        assert switch.is_on
    assert waits == [5, 10, 18, 18]
    assert switch.problem == "disk full"


def test_switch_recovers_with_a_success(clock: Clock) -> None:
    switch = WriteSwitch(clock=clock)
    switch.fail("disk full")
    switch.fail("disk full")
    assert switch.succeed()
    assert (switch.is_on, switch.problem) == (True, None)
    assert not switch.succeed()
    assert switch.fail("again") == 5


def test_clock_that_is_set_back_does_not_keep_the_switch_off(clock: Clock) -> None:
    switch = WriteSwitch(clock=clock)
    switch.fail("disk full")
    clock.now -= 3600
    assert switch.is_on
