"""Grammars of running sequences: matchers built and masks worked out on threads, while the device computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self

from vllm_mlx.core.grammar import GrammarError, Grammars, GrammarsFactory, Matcher, TokenMasks
from vllm_mlx.core.sampling import SamplingParams

WORD_BITS = 32


class Constraint:
    """The grammar of one sequence, from its first token to its last, whatever becomes of its slot."""

    def __init__(self, built: Future[tuple[Grammars, Matcher]], sampling: SamplingParams, *, num_taken: int) -> None:
        self._built = built
        self._sampling = sampling
        self._problem: str | None = None
        self.num_taken = num_taken
        """Output tokens that the matcher has taken."""

    @property
    def is_ready(self) -> bool:
        """Whether its matcher is built, or never will be."""
        return self._built.done()

    @property
    def problem(self) -> str | None:
        """Why the sequence cannot go on; None while it can."""
        if self._problem is None and self._built.done() and (error := self._built.exception()) is not None:
            self._problem = f"The grammar cannot be followed: {error}"
        return self._problem

    def fail(self, reason: str) -> None:
        """It cannot be followed any further."""
        self._problem = f"The grammar cannot be followed: {reason}"

    def ends_with(self, token_id: int) -> bool:
        """Whether an output that ends with this token is complete. Waits for the matcher."""
        return self._built.exception() is None and token_id in self._built.result()[0].end_token_ids

    def advance(self, token_ids: Sequence[int]) -> Matcher:
        """Take more output; returns the matcher. Raises GrammarError."""
        matcher = self._built.result()[1]
        if token_ids:
            matcher.advance(token_ids)
            self.num_taken += len(token_ids)
        return matcher

    def withheld(self) -> Iterable[int]:
        """Tokens that may only be taken if there are no others: those that would end the output too early."""
        return self._sampling.stop_token_ids if self.num_taken < self._sampling.min_tokens else ()


class Constrained(Protocol):
    """A sequence, as far as this module looks at it."""

    @property
    def constraint(self) -> Constraint | None:
        """Its grammar."""
        ...

    @property
    def token_ids(self) -> list[int]:
        """Known tokens: prompt, then output."""
        ...

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        ...


class Constraints:
    """All constraints of one engine. Called on the engine's thread only."""

    def __init__(self, factory: GrammarsFactory | None, *, vocab_size: int) -> None:
        self._factory = factory
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // WORD_BITS)
        self._grammars: Future[Grammars] | None = None
        # Building takes up to a second and must not hold up the masks of those that run.
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._prepared: Future[bytes] | None = None
        self._slots: tuple[int, ...] = ()

    def begin(self, sampling: SamplingParams, output: Sequence[int]) -> Constraint:
        """Start to build the matcher of a sequence that has this output already."""
        if self._grammars is None:
            self._grammars = self._builder.submit(self._load)
        built = self._builder.submit(_build, self._grammars, sampling.grammar or "", tuple(output))
        return Constraint(built, sampling, num_taken=len(output))

    def prepare(self, slots: tuple[int, ...], sequences: Sequence[Constrained]) -> None:
        """Start to work out which tokens may come next in these slots, for sequences all of whose tokens are known."""
        self._slots = slots
        jobs = [(each.constraint, tuple(_untaken(each))) for each in sequences if each.constraint is not None]
        self._prepared = self._worker.submit(self._work, jobs)

    @property
    def has_prepared(self) -> bool:
        """Whether masks were prepared and not taken."""
        return self._prepared is not None

    def masks(self) -> TokenMasks:
        """Wait for what was prepared, and take it."""
        prepared, self._prepared = self._prepared, None
        assert prepared is not None, "nothing was prepared"
        return TokenMasks(self._slots, prepared.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self._builder.shutdown(cancel_futures=True)
        self._worker.shutdown(cancel_futures=True)

    def _load(self) -> Grammars:
        if self._factory is None:
            raise GrammarError("this engine has no tokenizer to apply it to.")
        return self._factory(self._vocab_size)

    def _work(self, jobs: Sequence[tuple[Constraint, tuple[int, ...]]]) -> bytes:
        """One row for each job; rows of constraints that have failed allow everything: their tokens are dropped."""
        size = 4 * self._num_words
        words = bytearray(b"\xff" * (size * len(jobs)))
        followed: list[tuple[int, Constraint, Matcher]] = []
        for row, (constraint, token_ids) in enumerate(jobs):
            try:
                if constraint.problem is None:
                    followed.append((row, constraint, constraint.advance(token_ids)))
            except GrammarError as error:
                constraint.fail(str(error))
        if not followed or self._grammars is None:
            return bytes(words)
        found, problems = self._grammars.result().masks([matcher for _, _, matcher in followed])
        for index, (row, constraint, _) in enumerate(followed):
            reason = problems[index]
            if reason is not None:
                constraint.fail(reason)
                continue
            words[row * size : (row + 1) * size] = _without(found[index * size :][:size], constraint.withheld())
        return bytes(words)


def _build(loading: Future[Grammars], grammar: str, output: tuple[int, ...]) -> tuple[Grammars, Matcher]:
    grammars = loading.result()
    matcher = grammars.matcher(grammar)
    if output:
        matcher.advance(output)
    return grammars, matcher


def _untaken(sequence: Constrained) -> list[int]:
    assert sequence.constraint is not None
    return sequence.token_ids[sequence.num_prompt + sequence.constraint.num_taken :]


def _without(row: bytearray, token_ids: Iterable[int]) -> bytearray:
    """The row without these tokens; the row itself if nothing else is left."""
    less = bytearray(row)
    for token_id in token_ids:
        if token_id < 8 * len(less):
            less[token_id // 8] &= ~(1 << token_id % 8)
    return less if any(less) else row
