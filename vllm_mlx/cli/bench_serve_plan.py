"""From flags to what a benchmark shall do."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_mlx.bench.envelope import CapacityOptions, Objectives
from vllm_mlx.bench.options import Questions, RunOptions, SweepOptions, Target
from vllm_mlx.bench.prompts import PromptSet, load_set, of_mix, of_words
from vllm_mlx.bench.run import CapacityPlan, Plan, SweepPlan, WorkloadPlan
from vllm_mlx.bench.workload import load_workload
from vllm_mlx.cli.bench_serve_flags import CAPACITY, FLAGS, SWEEP, WORKLOAD, defaults
from vllm_mlx.core.errors import ConfigError

_MODE_FLAGS: Mapping[str, str] = {WORKLOAD: "--workload", CAPACITY: "--capacity-envelope"}


class Given:
    """Parsed flags: those that were given, and the defaults of the others."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        self._given: dict[str, Any] = vars(namespace)
        self._values = defaults() | self._given

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._given

    @property
    def mode(self) -> str:
        """Kind of run. Raises ConfigError if two are asked for."""
        if self["workload"] is not None and self["capacity_envelope"]:
            raise ConfigError("--workload: cannot be combined with --capacity-envelope")
        return WORKLOAD if self["workload"] is not None else CAPACITY if self["capacity_envelope"] else SWEEP

    def notices(self) -> list[str]:
        """One line for each flag that was given and means nothing in this kind of run."""
        mode = self.mode
        reason = f"has no effect with {_MODE_FLAGS[mode]}" if mode in _MODE_FLAGS else "has no effect here"
        idle = [flag for flag in FLAGS if flag.dest in self and mode not in flag.modes]
        needed = {WORKLOAD: " (it needs --workload)", CAPACITY: " (it needs --capacity-envelope)"}
        return [f"{flag.name} {reason}{needed.get(flag.modes[0], '') if mode == SWEEP else ''}" for flag in idle]


def read_run(given: Given, environment: Mapping[str, str]) -> RunOptions:
    """What every kind of run needs."""
    timeout_s = given["request_timeout_s"]
    return RunOptions(
        target=Target(
            url=given["url"],
            model=given["model"],
            api_key=given["api_key"] or environment.get("VLLM_MLX_API_KEY") or None,
            endpoint=given["endpoint"],
            timeout_s=timeout_s or None,
        ),
        questions=Questions(
            max_tokens=given["max_tokens"],
            temperature=given["temperature"],
            thinking=given["enable_thinking"],
            extra_bodies=given["extra_body"],
            ignore_eos=given["ignore_eos"],
        ),
        seed=random.randrange(1_000_000) if given["seed"] is None else given["seed"],
        scrape_metrics=given["scrape_metrics"],
        tag=given["tag"],
        overrides=dict(given["override_field"]),
        output=given["output"],
        format=given["format"],
    )


def read_plan(given: Given) -> Plan:
    """The kind of run that is asked for. Raises ConfigError for files that are no prompts or no workload."""
    match given.mode:
        case "workload":
            workload = load_workload(
                given["workload"], cache_policy=given["cache_policy"], max_tokens=given["max_tokens"]
            )
            return WorkloadPlan(workload, given["repetitions"], given["warmup"], given["include_content"])
        case "capacity":
            return CapacityPlan(_capacity(given))
    return SweepPlan(_sweep(given))


def _sweep(given: Given) -> SweepOptions:
    rates = given["request_rate"]
    system_path = given["system_prompt_file"]
    return SweepOptions(
        prompt_sets=_prompt_sets(given),
        is_shared_prefix=given["shared_prefix"],
        system_prompt=None if system_path is None else _read_text(system_path),
        concurrencies=(None,) if rates and "concurrency" not in given else given["concurrency"],
        rates=rates or (None,),
        num_requests=given["num_requests"],
        warmup=given["warmup"],
        repetitions=given["repetitions"],
        validate=given["validate"],
        skip_token_count=given["skip_preflight_token_count"] or system_path is not None,
        include_requests=given["include_requests"],
    )


def _prompt_sets(given: Given) -> tuple[PromptSet, ...]:
    generated = [*map(of_words, given["prompt_words"]), *map(of_mix, given["prompt_mix"])]
    names = given["prompts"] if "prompts" in given or not generated else ()
    found = [load_set(name, flag="--prompts") for name in names]
    if given["prompt_file"] is not None:
        found.append(load_set(str(given["prompt_file"]), flag="--prompt-file"))
    return (*found, *generated)


def _capacity(given: Given) -> CapacityOptions:
    for flag in ("enable_thinking", "extra_body"):
        if len(given[flag]) > 1:
            raise ConfigError(f"--{flag.replace('_', '-')}: takes one value with --capacity-envelope")
    return CapacityOptions(
        concurrencies=given["capacity_concurrency"],
        prompt_tokens=given["capacity_prompt_tokens"],
        output_tokens=given["capacity_output_tokens"],
        cache_modes=given["capacity_cache_modes"],
        repetitions=given["capacity_repetitions"],
        warmup=given["capacity_warmup"],
        baseline_url=given["capacity_baseline_url"],
        objectives=Objectives(
            max_p95_ttft_ms=given["capacity_max_p95_ttft_ms"],
            max_p95_chunk_gap_ms=given["capacity_max_p95_chunk_gap_ms"],
            max_p95_e2e_ms=given["capacity_max_p95_e2e_ms"],
            max_failure_rate=given["capacity_max_failure_rate"],
            max_ooms=given["capacity_max_ooms"],
            max_timeouts=given["capacity_max_timeouts"],
        ),
    )


def _read_text(path: Path) -> str:
    try:
        found = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--system-prompt-file: {path} cannot be read: {error}") from None
    if not found:
        raise ConfigError(f"--system-prompt-file: {path} is empty")
    return found
