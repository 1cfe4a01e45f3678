"""How far a benchmark is: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class BenchProgress:
    """Shows the part of a run that was begun last. A context manager: what it drew is gone afterwards."""

    def __init__(self, stream: TextIO) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(
            *columns, console=Console(file=stream), transient=True, redirect_stdout=False, disable=not stream.isatty(),
            refresh_per_second=4,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> BenchProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, text: str, total: int) -> None:
        """A part of `total` requests begins."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=total)

    def advance(self) -> None:
        """A request of it has ended."""
        if self._task is not None:
            self._progress.advance(self._task)
