"""What a person sees while a model is fetched, converted and loaded: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

LINE_EVERY = 0.25
"""Without a terminal, a line of the same text is printed again after this much progress."""


class Display:
    """A progress callback, usable from any thread. A context manager: what it drew on a terminal is gone afterwards."""

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        self._sink: _Bars | _Lines = _Bars(stream) if stream.isatty() else _Lines(stream)

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, text: str, fraction: float | None = None) -> None:
        """Show what is going on (`text`) and how far it is (`fraction` 0..1, None if unknown)."""
        self._sink.update(text, fraction)

    def close(self) -> None:
        """Stop drawing. What is reported later starts a new drawing."""
        self._sink.close()


class _Bars:
    """One bar: the text that was reported last."""

    def __init__(self, stream: TextIO) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=Console(file=stream), transient=True, redirect_stdout=False)
        self._task: TaskID | None = None
        self._text = ""
        self._lock = threading.Lock()

    def update(self, text: str, fraction: float | None) -> None:
        with self._lock:
            if self._task is None or text != self._text:
                if self._task is not None:
                    self._progress.remove_task(self._task)
                self._task = self._progress.add_task(text, total=None)
                self._text = text
            self._progress.update(self._task, total=None if fraction is None else 1.0, completed=fraction or 0.0)
            self._progress.start()

    def close(self) -> None:
        with self._lock:
            if self._task is not None:
                self._progress.remove_task(self._task)
                self._task = None
            self._progress.stop()


class _Lines:
    """A line when the text changes, and a few on the way."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._printed = 0.0
        self._lock = threading.Lock()

    def update(self, text: str, fraction: float | None) -> None:
        with self._lock:
            reached = fraction or 0.0
            if text == self._text and reached < self._printed + LINE_EVERY:
                return
            percent = "" if fraction is None else f" {fraction:.0%}"
            print(f"{text}{percent}", file=self._stream, flush=True)
            self._text, self._printed = text, reached

    def close(self) -> None:
        """Nothing to tidy up."""
