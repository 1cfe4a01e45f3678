"""A step in the making, and one that waits for its result."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from vllm_mlx.core.messages import Output
from vllm_mlx.core.step import DecodeRow, NewSequence, PrefillRow, Step, StepResult
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.kv.admission import Orders
from vllm_mlx.kv.disk import Export
from vllm_mlx.kv.manager import KVManager
from vllm_mlx.kv.tiers.record import Kind


class Row(msgspec.Struct, frozen=True, gc=False):
    """What a launched step does for one sequence."""

    sequence: Sequence
    num_computed: int
    """Tokens in its cache once the step is done."""
    samples: bool


class Taken(msgspec.Struct, frozen=True, gc=False):
    """A checkpoint that a step takes of one sequence."""

    sequence: Sequence
    slot: int
    number: int
    num_computed: int


class Launched(msgspec.Struct, frozen=True):
    """A step that waits for its result."""

    step: Step
    rows: list[Row]
    taken: list[Taken]
    exports: tuple[Export, ...]
    constrained: tuple[Sequence, ...]
    """Those of `Step.constrained`."""

    def remember(self, kv: KVManager, result: StepResult) -> None:
        """Give the cache what the step did for it alone."""
        if self.exports:
            kv.store(self.exports, result.exported)
        for taken, size_bytes in zip(self.taken, result.checkpoint_bytes, strict=False):
            sequence, number, num_computed = taken.sequence, taken.number, taken.num_computed
            if sequence.slot is None:  # another may have its name by now
                kv.drop_checkpoint(number)
                continue
            kv.keep_checkpoint(
                sequence.request_id, number, sequence.token_ids, num_computed=num_computed, size_bytes=size_bytes
            )

    @property
    def prompts(self) -> list[Row]:
        """The rows of its chunks."""
        return self.rows[len(self.rows) - len(self.step.prefills) :]

    def prompt_outputs(self, result: StepResult) -> list[Output]:
        """What the step tells of prompts."""
        return [
            Output(row.sequence.request_id, prompt_logprobs=found)
            for row, found in zip(self.prompts, result.prompt_logprobs or (), strict=False)
            if found is not None and not row.sequence.is_finished
        ]


@dataclass(slots=True)
class Draft:
    """A step in the making; `rows` has decodes first, like `Step.sampled_slots`."""

    new: list[NewSequence] = field(default_factory=list)
    decodes: list[DecodeRow] = field(default_factory=list)
    prefills: list[PrefillRow] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    """What is told before the step is carried out."""

    def decode_chunk(self, kv: KVManager, sequence: Sequence, *, num_rows: int) -> None:
        """Rows for tokens that are not computed; the last of those that are known, or on their way, samples."""
        slot, start, end = sequence.slot, sequence.num_computed, sequence.num_computed + num_rows
        assert slot is not None
        page_ids, others = kv.row_tables(sequence.request_id)
        samples = end == sequence.num_tokens
        self.decodes += (
            DecodeRow(slot, at, page_ids, others, sequence.known_token(at), samples and at == end - 1)
            for at in range(start, end)
        )
        self.add(sequence, num_rows, samples=samples)
        self.take_checkpoint(kv, sequence)

    def take_checkpoint(self, kv: KVManager, sequence: Sequence) -> None:
        """Have the state behind the row just planned copied, if that is due there."""
        assert sequence.slot is not None
        number = kv.checkpoint_due(sequence.request_id, sequence.num_computed)
        if number is not None:
            self.taken.append(Taken(sequence, sequence.slot, number, sequence.num_computed))

    def add(self, sequence: Sequence, num_tokens: int, *, samples: bool) -> None:
        """Count what a row will have done once the step is carried out."""
        sequence.num_computed += num_tokens
        sequence.num_pending += samples
        self.rows.append(Row(sequence, sequence.num_computed, samples))

    def launched(self, number: int, *, released: list[int], orders: Orders) -> Launched:
        """The finished step."""
        constrained = tuple(row.sequence for row in self.rows if row.samples and row.sequence.constraint is not None)
        numbers = {kind: tuple(each.number for each in orders.exports if each.kind is kind) for kind in Kind}
        step = Step(
            number=number,
            released=tuple(released),
            exports=numbers[Kind.PAGE],
            checkpoint_exports=numbers[Kind.CHECKPOINT],
            imports=orders.imports,
            checkpoint_imports=orders.checkpoint_imports,
            copies=orders.copies,
            new=tuple(self.new),
            dropped=orders.dropped,
            prefills=tuple(self.prefills),
            decodes=tuple(self.decodes),
            checkpoints=tuple((each.slot, each.number) for each in self.taken),
            constrained=tuple(sequence.slot for sequence in constrained if sequence.slot is not None),
        )
        return Launched(step, self.rows, self.taken, orders.exports, constrained)
