"""What a benchmark run shall do, read from the command line once and checked there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_mlx.bench.prompts import PromptSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server under test."""

    url: str
    model: str | None = None
    """None: the first that it lists."""
    api_key: str | None = None
    endpoint: str = "chat"
    """'chat' or 'completions'."""
    timeout_s: float | None = 300.0
    """Longest silence while an answer is awaited; None: no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Fields of every request."""

    max_tokens: int = 256
    temperature: float | None = 0.0
    thinking: tuple[bool | None, ...] = (None,)
    """Each value is a configuration; None leaves it to the server."""
    extra_bodies: tuple[Mapping[str, Any], ...] = field(default_factory=lambda: ({},))
    """Each is a configuration."""
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """The product of prompt sets, concurrencies, thinking modes and extra bodies."""

    prompt_sets: tuple[PromptSet, ...]
    is_shared_prefix: bool = False
    system_prompt: str | None = None
    concurrencies: tuple[int | None, ...] = (1, 4)
    """None: no bound (with a rate)."""
    rates: tuple[float | None, ...] = (None,)
    num_requests: int | None = None
    """Per repetition; None: one for each client, or a whole mix."""
    warmup: int = 1
    repetitions: int = 3
    validate: bool = True
    skip_token_count: bool = False
    include_requests: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What holds for every kind of run."""

    target: Target
    questions: Questions
    seed: int
    scrape_metrics: bool = True
    tag: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """Result field -> value that replaces what was found."""
    output: Path | None = None
    format: str = "auto"
