"""What a runner without a model holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import Step, StepResult


@dataclass(slots=True)
class Slot:
    """What a real runner would keep on the device for one sequence."""

    number: int
    sampling: SamplingParams
    token_ids: list[int]
    """Everything known: given tokens, then sampled ones."""
    num_given: int
    num_prompt: int
    num_cached: int = 0
    num_shared: int = 0
    """Tokens that it started with."""
    tables: tuple[tuple[int, ...], ...] = ()
    used: set[int] = field(default_factory=set)
    """Pages in its tables that its next token may look at."""
    chain: list[int] = field(default_factory=list)
    """A number for every token that depends on all before it."""
    row: list[int] = field(default_factory=list)
    """What is kept outside pages: the tokens so far. All of the cache when there are no pages."""


@dataclass(frozen=True, slots=True)
class StagedBytes:
    """`core.step.Staged`: bytes that are in plain memory anyway."""

    payload: bytes

    @property
    def nbytes(self) -> int:
        """How many."""
        return len(self.payload)

    def take(self) -> memoryview:
        """A copy of them."""
        return memoryview(bytearray(self.payload))


@dataclass(slots=True, eq=False)
class Handle:
    """A step that was built: its numbers, and when the imaginary device has them ready."""

    step: Step
    result: StepResult
    sampled: list[Slot]
    ready_at: float = 0.0
    is_started: bool = False
    is_sampled: bool = False
