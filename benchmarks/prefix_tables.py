"""What the measurements of the prefix cache share: tables of times, and waiting for the disk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

CASES = ("cold", "repeat", "other end", "restart")
"""The same prompt for the first time, again, with another end, and again after a restart with the same folder."""
QUIET_S = 3.0
WRITTEN_TIMEOUT_S = 120.0

Seconds = dict[str, list[float]]
"""Case -> time to the first token in each round."""


def wait_written(folder: Path) -> int:
    """Wait until nothing has been added to a folder for some seconds; returns its size in bytes."""
    deadline, quiet_since, size = time.monotonic() + WRITTEN_TIMEOUT_S, time.monotonic(), -1
    while time.monotonic() < min(deadline, quiet_since + QUIET_S):
        if (now := size_bytes(folder)) != size:
            quiet_since, size = time.monotonic(), now
        time.sleep(0.2)
    return max(0, size)


def size_bytes(folder: Path) -> int:
    """Of all files below it; files that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def table(seconds: Mapping[str, Seconds], *, first: str) -> str:
    """Markdown: medians in milliseconds, and per cent of the cold time of the same round."""
    head = (first, *(part for case in CASES for part in ((f"{case}, ms",) if case == "cold" else (case, "of cold"))))
    rows = [head, tuple("---" for _ in head), *(_row(name, found) for name, found in seconds.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def percent_of_cold(found: Seconds, case: str) -> float | None:
    """The median of the rounds' ratios; None without a round that has both."""
    ratios = [100 * value / cold for value, cold in zip(found.get(case, ()), found.get("cold", ()), strict=False)]
    return statistics.median(ratios) if ratios else None


def _row(name: str, found: Seconds) -> tuple[str, ...]:
    cells = [name]
    for case in CASES:
        times = found.get(case)
        cells.append(f"{1000 * statistics.median(times):,.0f}" if times else "-")
        if case != "cold":
            percent = percent_of_cold(found, case)
            cells.append("" if percent is None else f"**{percent:.1f} %**")
    return tuple(cells)
