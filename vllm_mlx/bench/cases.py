"""Runs a workload: every case, repeated, one request at a time, each answer checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_mlx.bench import metrics
from vllm_mlx.bench.checks import issues
from vllm_mlx.bench.rows import Row, cache_fields
from vllm_mlx.bench.sample import Sample
from vllm_mlx.bench.session import Progress, Session, now
from vllm_mlx.bench.workload import Case, Workload

KIND = "vllm-mlx-bench-serve-workload"
PREVIEW_CHARS = 240
FIELDS = (
    *("run_id", "timestamp", "workload", "case_id", "repetition", "tags", "model_id"),
    *("chip", "memory_gb", "os_version", "engine_type", "model_type", "mtp_enabled", "specprefill", "kv_quant"),
    *("cache_type", "request_max_tokens", "request_enable_thinking", "request_extra_body"),
    *("policy_timeout_ms", "within_policy_timeout", "ttft_ms", "tpot_ms", "e2e_latency_ms", "gen_tps", "prompt_tps"),
    *("prompt_tokens", "completion_tokens", "cache_hits", "cache_misses", "tokens_saved"),
    *("metal_active_gb", "metal_peak_gb", "metal_cache_gb"),
    *("quality_ok", "quality_issues", "finish_reason", "content_chars", "content_preview", "tag", "ok"),
)
"""Every column of the flat formats, in order."""
_HARDWARE = ("chip", "gpu_cores", "memory_gb", "bandwidth_gbs", "os_version")


@dataclass(slots=True)
class WorkloadResult:
    """Records so far."""

    records: list[Row] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CaseRunner:
    """Runs the cases of a workload in a session."""

    session: Session
    workload: Workload
    result: WorkloadResult
    progress: Progress
    include_content: bool = False

    async def run(self, *, repetitions: int, warmup: int) -> None:
        """Every case `warmup` times unmeasured, then every case `repetitions` times."""
        cases, policy = self.workload.cases, self.workload.cache_policy
        if warmup:
            self.progress.begin(f"{self.workload.name}: warm-up", warmup * len(cases))
        for case in cases * warmup:
            await self._ask(case)
            self.progress.advance()
        reset = await self.session.server.reset_cache() if policy == "before-run" else None
        self.progress.begin(self.workload.name, repetitions * len(cases))
        for repetition in range(1, repetitions + 1):
            for case in cases:
                if policy == "before-case":
                    reset = await self.session.server.reset_cache()
                await self._measure(case, repetition, reset=reset)
                self.progress.advance()

    async def _measure(self, case: Case, repetition: int, *, reset: str | None) -> None:
        change: dict[str, float] = {}
        started_at = now()
        async with self.session.counting(change):
            sample = await self._ask(case)
        memory = await self.session.server.memory()
        record = self._head(case, repetition, started_at=started_at) | self._judged(case, sample)
        record["cache_reset"] = {"policy": self.workload.cache_policy, "result": reset}
        record["metrics"] = _metrics(sample) | cache_fields(change) | memory
        record["metrics_delta"] = metrics.changed(change)
        self.result.records.append(record)

    async def _ask(self, case: Case) -> Sample:
        ask = self.session.ask(
            case.messages,
            max_tokens=case.max_tokens,
            thinking=case.enable_thinking,
            extra_body=case.extra_body,
            temperature=self.session.options.questions.temperature,
        )
        return await self.session.client.ask(ask)

    def _head(self, case: Case, repetition: int, *, started_at: str) -> Row:
        facts = self.session.facts | self.session.options.overrides
        return self.session.identity() | {
            "started_at": started_at,
            "workload": self.workload.name,
            "case_id": case.id,
            "repetition": repetition,
            "tags": list(case.tags),
            "runtime": {name: value for name, value in facts.items() if name not in _HARDWARE},
            "hardware": {name: value for name, value in facts.items() if name in _HARDWARE},
            "request": {
                "max_tokens": case.max_tokens,
                "enable_thinking": case.enable_thinking,
                "extra_body": dict(case.extra_body),
            },
        }

    def _judged(self, case: Case, sample: Sample) -> Row:
        found, limit_ms = issues(sample, case.checks), case.policy_timeout_ms
        is_within = None if limit_ms is None else sample.e2e_s * 1000 <= limit_ms
        quality: dict[str, Any] = {
            "ok": not found,
            "issues": found,
            "finish_reason": sample.finish_reason,
            "content_chars": len(sample.content),
            "content_preview": sample.content[:PREVIEW_CHARS],
        }
        if self.include_content:
            quality["content"] = sample.content
        return {
            "policy": {"timeout_ms": limit_ms, "within_timeout": is_within},
            "quality": quality,
            "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in sample.tool_calls],
            "ok": not found and is_within is not False,
        }


def _metrics(sample: Sample) -> Row:
    ttft_s, tpot_s = sample.ttft_s, sample.tpot_s
    return {
        "ttft_ms": None if ttft_s is None else ttft_s * 1000,
        "tpot_ms": None if tpot_s is None else tpot_s * 1000,
        "e2e_latency_ms": sample.e2e_s * 1000,
        "gen_tps": sample.decode_tokens_per_s,
        "prompt_tps": sample.prompt_tokens_per_s,
        "prompt_tokens": sample.usage_prompt_tokens,
        "completion_tokens": sample.completion_tokens,
        "cached_tokens": sample.cached_tokens,
        "tokens_counted_by": sample.counted_by,
    }


def flat(record: Row) -> Row:
    """A record as one line of columns."""
    request, policy, quality = record["request"], record["policy"], record["quality"]
    named = {f"request_{name}": value for name, value in request.items()}
    named |= {"policy_timeout_ms": policy["timeout_ms"], "within_policy_timeout": policy["within_timeout"]}
    named |= {"quality_ok": quality["ok"], "quality_issues": quality["issues"]}
    named |= {name: quality[name] for name in ("finish_reason", "content_chars", "content_preview")}
    everything = record | record["runtime"] | record["hardware"] | record["metrics"] | named
    return {name: everything.get(name) for name in FIELDS}
