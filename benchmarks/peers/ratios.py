"""From rounds to ratios: ours over theirs, round by round, and the median of that."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from servers import OURS

Row = dict[str, Any]
FIGURES = ("throughput_tps", "ttft_ms", "ttft_ms_p95", "tpot_ms")


@dataclass
class Measured:
    """What one server gave: round -> configuration -> row of bench-serve; and what went wrong."""

    rounds: dict[int, dict[str, Row]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def configurations(self) -> list[str]:
        """In the order in which they ran."""
        return list(dict.fromkeys(name for rows in self.rounds.values() for name in rows))

    def rows(self, configuration: str) -> list[Row]:
        """One for each round that got so far."""
        return [rows[configuration] for rows in self.rounds.values() if configuration in rows]


def name_of(row: Row) -> str:
    """A configuration in words."""
    load = f"{row['concurrency']} at once" if row["request_rate"] is None else f"{row['request_rate']} requests/s"
    return f"{row['prompt_set']}, {load}"


def summarize(measured: dict[str, Measured]) -> list[Row]:
    """A line for each configuration and server."""
    configurations = dict.fromkeys(name for found in measured.values() for name in found.configurations)
    return [_line(configuration, server, measured) for configuration in configurations for server in measured]


def _line(configuration: str, server: str, measured: dict[str, Measured]) -> Row:
    rows = measured[server].rows(configuration)
    line: Row = {
        "configuration": configuration,
        "server": server,
        "rounds": len(rows),
        "requests": sum(row["num_requests"] for row in rows),
        "failures": sum(row["failures"] for row in rows),
        "completion_tokens": _median(row["completion_tokens"] for row in rows),
    }
    for figure in FIGURES:
        line[figure] = _median(row[figure] for row in rows)
        line[f"{figure}_ratio"] = _ratio(configuration, server, measured, figure) if server != OURS else None
    return line


def _ratio(configuration: str, server: str, measured: dict[str, Measured], figure: str) -> float | None:
    """Ours over theirs in the same round; the median of the rounds that both have."""
    ours, theirs = measured.get(OURS, Measured()).rounds, measured[server].rounds
    pairs = [
        (ours[number][configuration][figure], theirs[number][configuration][figure])
        for number in ours.keys() & theirs.keys()
        if configuration in ours[number] and configuration in theirs[number]
    ]
    return _median(a / b for a, b in pairs if a is not None and b)


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def table(lines: list[Row], measured: dict[str, Measured]) -> str:
    """Markdown. Ratios are ours over theirs: of tokens per second more is better, of times less."""
    ratio = "ours / theirs"
    head = ("configuration", "server", "tokens/s", ratio, "TTFT p95", ratio, "per token", ratio, "failed")
    rows = [head, tuple("---" for _ in head), *map(_cells, lines)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    problems = [f"- {name}: {error}" for name, found in measured.items() for error in dict.fromkeys(found.errors)]
    return "\n".join([text, *(["", *problems] if problems else [])])


def _cells(line: Row) -> tuple[str, ...]:
    return (
        line["configuration"],
        line["server"],
        _figure(line["throughput_tps"], ""),
        _times(line["throughput_tps_ratio"]),
        _figure(line["ttft_ms_p95"], " ms"),
        _times(line["ttft_ms_p95_ratio"]),
        _figure(line["tpot_ms"], " ms"),
        _times(line["tpot_ms_ratio"]),
        f"{line['failures']} of {line['requests']}" if line["requests"] else "not measured",
    )


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.1f}{unit}"


def _times(value: float | None) -> str:
    return "" if value is None else f"**{value:.2f} x**"
