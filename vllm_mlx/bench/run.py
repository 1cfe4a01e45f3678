"""Runs a benchmark from the first request to the report; what was measured survives Ctrl-C."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from vllm_mlx.bench import report
from vllm_mlx.bench.capacity import Capacity, CapacityResult
from vllm_mlx.bench.cases import CaseRunner, WorkloadResult
from vllm_mlx.bench.envelope import CapacityOptions
from vllm_mlx.bench.options import RunOptions, SweepOptions
from vllm_mlx.bench.report import Report
from vllm_mlx.bench.session import Progress, Session, open_session
from vllm_mlx.bench.sweep import Sweep, SweepResult
from vllm_mlx.bench.workload import Workload


class Plan(Protocol):
    """One kind of run, and what it has measured so far."""

    @property
    def default_format(self) -> str:
        """What 'auto' means for it."""

    async def run(self, session: Session, progress: Progress) -> None:
        """Measure everything."""

    def report(self, session: Session, *, is_complete: bool) -> Report:
        """What was measured, at any time."""

    def has_succeeded(self) -> bool:
        """Whether the command may say so."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """A prompt sweep. It has succeeded if any request was answered."""

    options: SweepOptions
    result: SweepResult = field(default_factory=SweepResult)
    default_format = "table"

    async def run(self, session: Session, progress: Progress) -> None:
        """All configurations."""
        await Sweep(session, self.options, result=self.result, progress=progress).run()

    def report(self, session: Session, *, is_complete: bool) -> Report:
        """Rows so far."""
        return report.of_sweep(session, self.result, is_complete=is_complete)

    def has_succeeded(self) -> bool:
        """Whether any request was answered."""
        return any(row["failures"] < row["num_requests"] for row in self.result.rows)


@dataclass(frozen=True, slots=True)
class WorkloadPlan:
    """A workload. It has succeeded if every answer passed its checks in time."""

    workload: Workload
    repetitions: int
    warmup: int
    include_content: bool
    result: WorkloadResult = field(default_factory=WorkloadResult)
    default_format = "json"

    async def run(self, session: Session, progress: Progress) -> None:
        """All cases."""
        runner = CaseRunner(session, self.workload, self.result, progress, self.include_content)
        await runner.run(repetitions=self.repetitions, warmup=self.warmup)

    def report(self, session: Session, *, is_complete: bool) -> Report:
        """Records so far."""
        return report.of_workload(session, self.workload, self.result, is_complete=is_complete)

    def has_succeeded(self) -> bool:
        """Whether every record is fine."""
        return all(record["ok"] for record in self.result.records)


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """A capacity envelope. It has succeeded once it is measured, whatever the verdicts."""

    options: CapacityOptions
    result: CapacityResult = field(default_factory=CapacityResult)
    default_format = "json"

    async def run(self, session: Session, progress: Progress) -> None:
        """All cells."""
        await Capacity(session, self.options, result=self.result, progress=progress).run()

    def report(self, session: Session, *, is_complete: bool) -> Report:
        """Cells so far."""
        return report.of_capacity(session, self.options, self.result, is_complete=is_complete)

    def has_succeeded(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    report: Report | None
    """None if nothing was measured."""
    is_interrupted: bool


def execute(options: RunOptions, plan: Plan, *, progress: Progress) -> Outcome:
    """Run a plan; Ctrl-C ends it early.

    Raises:
        ServerUnusable: the server cannot be reached or asked.
    """
    sessions: list[Session] = []

    async def run() -> None:
        sessions.append(await open_session(options))
        await plan.run(sessions[0], progress)

    is_interrupted = False
    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        is_interrupted = True
    found = plan.report(sessions[0], is_complete=not is_interrupted) if sessions else None
    return Outcome(None if found is None or found.is_empty else found, is_interrupted)
