"""What a run hands out: a document, and the same as flat rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_mlx.bench import capacity, cases, rows, sweep
from vllm_mlx.bench.capacity import CapacityResult
from vllm_mlx.bench.cases import WorkloadResult
from vllm_mlx.bench.envelope import CapacityOptions
from vllm_mlx.bench.rows import Row
from vllm_mlx.bench.session import Session, now
from vllm_mlx.bench.sweep import SweepResult
from vllm_mlx.bench.workload import Workload

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Results in the shapes that the formats need."""

    document: Row
    """Everything, for JSON."""
    table: str
    """Name of the table in a database."""
    fields: tuple[str, ...]
    """Columns, in order."""
    rows: list[Row]
    """Flat: these columns and maybe more."""
    shown: list[Row]
    """Lines of the table for people."""
    shown_fields: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not self.rows


def of_sweep(session: Session, result: SweepResult, *, is_complete: bool) -> Report:
    """A prompt sweep."""
    document = _head(sweep.KIND, session, is_complete=is_complete)
    document |= {"summary": result.summaries, "rows": result.rows}
    return Report(
        document=document,
        table="bench_serve",
        fields=_with_overrides(rows.FIELDS, session),
        rows=result.rows,
        shown=result.summaries,
        shown_fields=_sweep_columns(result.summaries),
    )


def of_workload(session: Session, workload: Workload, result: WorkloadResult, *, is_complete: bool) -> Report:
    """A workload."""
    document = _head(cases.KIND, session, is_complete=is_complete)
    document |= {
        "workload": workload.name,
        "description": workload.description,
        "cache_policy": workload.cache_policy,
        "summary": {
            "records": len(result.records),
            "ok": sum(record["ok"] for record in result.records),
            "quality_ok": sum(record["quality"]["ok"] for record in result.records),
            "over_policy_timeout": sum(r["policy"]["within_timeout"] is False for r in result.records),
        },
        "records": result.records,
    }
    flat = [cases.flat(record) | session.options.overrides for record in result.records]
    columns = ("case_id", "repetition", "prompt_tokens", "completion_tokens", "ttft_ms", "tpot_ms", "e2e_latency_ms")
    return Report(
        document=document,
        table="bench_serve_workload",
        fields=_with_overrides(cases.FIELDS, session),
        rows=flat,
        shown=flat,
        shown_fields=(*columns, "within_policy_timeout", "finish_reason", "ok", "quality_issues"),
    )


def of_capacity(session: Session, options: CapacityOptions, result: CapacityResult, *, is_complete: bool) -> Report:
    """A capacity envelope."""
    flat = [_p95_columns(cell) for cell in result.cells]
    columns = ("prompt_tokens_requested", "output_tokens_requested", "cache_mode", "concurrency", "num_requests")
    figures = ("failures", "ttft_ms_p95", "chunk_gap_ms_p95", "e2e_latency_ms_p95", "throughput_tps")
    return Report(
        document=capacity.document(session, options, result) | {"complete": is_complete},
        table="bench_serve_capacity",
        fields=_with_overrides((*capacity.FIELDS, *_P95), session),
        rows=flat,
        shown=flat,
        shown_fields=(*columns, *figures, "verdict", "reasons"),
    )


_SPREAD = ("ttft_ms", "tpot_ms", "chunk_gap_ms", "e2e_latency_ms")
_P95 = tuple(f"{name}_p95" for name in _SPREAD)


def _p95_columns(cell: Row) -> Row:
    """A cell whose distributions are columns: the mean under the plain name, and the p95."""
    found = {name: cell.get(name) or {} for name in _SPREAD}
    means = {name: spread.get("mean") for name, spread in found.items()}
    return cell | means | {f"{name}_p95": spread.get("p95") for name, spread in found.items()}


def _head(kind: str, session: Session, *, is_complete: bool) -> Row:
    return {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "run_id": session.run_id,
        "tag": session.options.tag,
        "started_at": session.started_at,
        "finished_at": now(),
        "complete": is_complete,
        "provenance": session.provenance(),
    }


def _with_overrides(fields: Sequence[str], session: Session) -> tuple[str, ...]:
    return (*fields, *(name for name in session.options.overrides if name not in fields))


def _sweep_columns(summaries: Sequence[Row]) -> tuple[str, ...]:
    """What people look at; columns that would say the same in every line stay away."""
    optional = ("request_rate", "enable_thinking", "extra_body")
    varied = [name for name in optional if any(row.get(name) is not None for row in summaries)]
    return (
        *("prompt_set", "concurrency", *varied, "num_requests", "failures", "prompt_tokens", "completion_tokens"),
        *("ttft_ms", "ttft_ms_p95", "tpot_ms", "itl_ms_p95", "gen_tps", "prompt_tps", "e2e_latency_ms"),
        *("throughput_tps", "requests_per_s", "validated"),
    )


def notes(document: Row) -> list[str]:
    """Lines below the table: what failed, how tokens were counted, what the server's counters did."""
    found: list[str] = []
    summaries: list[Any] = document["summary"] if document["kind"] == sweep.KIND else []
    for row in summaries:
        load = f"{row['prompt_set']}, concurrency {row['concurrency']}"
        if row["failure_kinds"]:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in row["failure_kinds"].items())
            found.append(f"failures ({load}): {kinds}")
        if row["tokens_counted_by"] == "chunks":
            found.append(f"tokens ({load}): the server reports no usage; chunks with text are counted instead")
    total: dict[str, float] = {}
    for row in document.get("rows") or document.get("records") or ():
        for name, value in row.get("metrics_delta", {}).items():
            total[name] = total.get(name, 0.0) + value
    found += [f"server: {name} +{value:g}" for name, value in sorted(total.items()) if not name.endswith("}")]
    if not document["complete"]:
        found.append("stopped before the end: these are the measurements up to then")
    return found
