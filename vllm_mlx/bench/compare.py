"""Two results side by side: for each configuration that both have, how the figures changed."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_mlx.bench import capacity, cases, sweep
from vllm_mlx.bench.prompts import read_json
from vllm_mlx.bench.rows import CONFIGURATION, Row
from vllm_mlx.bench.stats import mean
from vllm_mlx.core.errors import ConfigError

SAME = 0.02
"""Changes below 2 % are called the same."""
_LOWER_IS_BETTER = (
    *("ttft_ms", "ttft_ms_p95", "tpot_ms", "itl_ms_p95", "chunk_gap_ms_p95", "e2e_latency_ms", "e2e_latency_ms_p95"),
    "failures",
)
_HIGHER_IS_BETTER = ("gen_tps", "prompt_tps", "throughput_tps", "requests_per_s", "ok")
METRICS = (*_LOWER_IS_BETTER[:-1], *_HIGHER_IS_BETTER, "failures")


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one configuration in both results."""

    configuration: str
    metric: str
    before: float
    after: float

    @property
    def ratio(self) -> float | None:
        """After over before; None if before is nothing."""
        return self.after / self.before if self.before else None

    @property
    def verdict(self) -> str:
        """'better', 'worse' or 'same'."""
        if self.after == self.before or (self.ratio is not None and abs(self.ratio - 1) < SAME):
            return "same"
        return "better" if (self.after < self.before) == (self.metric in _LOWER_IS_BETTER) else "worse"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that two results say about each other."""

    changes: list[Change]
    only_before: list[str]
    """Configurations that the second result lacks."""
    only_after: list[str]


def load(path: Path) -> Row:
    """A result in JSON. Raises ConfigError if it is none."""
    document = read_json(path, flag="compare")
    if not isinstance(document, dict) or str(document.get("kind")) not in _READERS:
        raise ConfigError(f"compare: {path} is not a result of bench-serve --format json")
    return document


def compare(before: Row, after: Row) -> Comparison:
    """Match the configurations. Raises ConfigError for results of different kinds."""
    if before["kind"] != after["kind"]:
        raise ConfigError(f"compare: the results are of different kinds, {before['kind']} and {after['kind']}")
    read = _READERS[before["kind"]]
    one, other = read(before), read(after)
    changes = [
        Change(name, metric, float(figures[metric]), float(other[name][metric]))
        for name, figures in one.items()
        if name in other
        for metric in METRICS
        if _is_number(figures.get(metric)) and _is_number(other[name].get(metric))
    ]
    return Comparison(changes, [n for n in one if n not in other], [n for n in other if n not in one])


def write(found: Comparison, file: TextIO) -> None:
    """A table of ratios, and what could not be compared."""
    console = Console(file=file, width=None if file.isatty() else 160, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("configuration", "figure", "A", "B", "B / A", ""):
        table.add_column(title, justify="left" if title in ("configuration", "figure", "") else "right")
    shown = ""
    for change in found.changes:
        name = "" if change.configuration == shown else change.configuration
        shown = change.configuration
        ratio = "-" if change.ratio is None else f"{change.ratio:.2f} x"
        figures = (_figure(change.before), _figure(change.after), ratio)
        table.add_row(Text(name), change.metric, *figures, _SIGNS[change.verdict])
    console.print(table)
    for names, which in ((found.only_before, "A"), (found.only_after, "B")):
        for name in names:
            console.print(f"only in {which}: {name}", markup=False)
    if not found.changes:
        console.print("no configuration is in both results")


_SIGNS: Mapping[str, Text] = types.MappingProxyType(
    {"better": Text("▲ better", "green"), "worse": Text("▼ worse", "red"), "same": Text("= same")}
)


def _sweep(document: Row) -> dict[str, Row]:
    return {_name({key: row.get(key) for key in CONFIGURATION}): row for row in document["summary"]}


def _workload(document: Row) -> dict[str, Row]:
    """Means over the repetitions of each case."""
    found: dict[str, list[Row]] = {}
    for record in document["records"]:
        found.setdefault(f"{record['workload']}: {record['case_id']}", []).append(record)
    return {
        name: {metric: mean([v for r in records if _is_number(v := r["metrics"].get(metric))]) for metric in METRICS}
        | {"ok": mean([float(record["ok"]) for record in records])}
        for name, records in found.items()
    }


def _capacity(document: Row) -> dict[str, Row]:
    found = {}
    for cell in document["cells"]:
        keys = ("prompt_tokens_requested", "output_tokens_requested", "cache_mode", "concurrency")
        spread = {
            f"{name}_p95": (cell.get(name) or {}).get("p95") for name in ("ttft_ms", "chunk_gap_ms", "e2e_latency_ms")
        }
        found[_name({key: cell[key] for key in keys})] = {**cell, **spread}
    return found


_READERS: Mapping[str, Callable[[Row], dict[str, Row]]] = {
    sweep.KIND: _sweep,
    cases.KIND: _workload,
    capacity.KIND: _capacity,
}


def _name(values: Mapping[str, Any]) -> str:
    """'short, concurrency 4, max_tokens 256'; the first value speaks for itself."""
    (_, first), *rest = ((key, value) for key, value in values.items() if value is not None)
    return ", ".join([str(first), *(f"{key} {_text(value)}" for key, value in rest)])


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
