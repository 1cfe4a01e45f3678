"""What limits the tokens of running sequences: matchers and masks, made on threads while the device computes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self

from vllm_mlx.core.grammar import GrammarError, Grammars, GrammarsFactory, Matcher, TokenMasks
from vllm_mlx.core.log import get_logger
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.token_rules import TokenRules

log = get_logger("engine")
WORD_BITS = 32


class Constraint:
    """What limits the tokens of one sequence, from its first token to its last, whatever becomes of its slot."""

    def __init__(
        self,
        built: Future[tuple[Grammars, Matcher]] | None,
        rules: TokenRules,
        output: Sequence[int],
        *,
        yields: bool = False,
    ) -> None:
        """`built`: its grammar's matcher, at the end of `output`; None if it has no grammar. See `grammar_yields`."""
        self._built = built
        self._matcher: Matcher | None = None
        """Its grammar's, once it is known to be built."""
        self._end_token_ids: frozenset[int] = frozenset()
        """Its grammar's, once they are known, too."""
        self._yields = yields
        self._rules = rules
        self._last = deque(output, maxlen=rules.num_remembered)
        self._problem: str | None = None
        self.num_taken = len(output)
        """Output tokens that were looked at."""
        self.forced: tuple[int, ...] = ()
        """Tokens that must follow the next one, as of the masks that were taken last."""

    @property
    def is_ready(self) -> bool:
        """Whether its matcher is built, or never will be."""
        return self._built is None or self._built.done()

    @property
    def problem(self) -> str | None:
        """Why the sequence cannot go on; None while it can."""
        built = self._built
        if self._problem or self._matcher is not None or built is None or not built.done():
            return self._problem
        if (error := built.exception()) is not None:
            self.fail(str(error))
        return self._problem

    def fail(self, reason: str) -> None:
        """It cannot be followed any further; a grammar that yields is dropped."""
        if self._yields and self._built is not None:
            self._built = self._matcher = None
            self._end_token_ids = frozenset()
            log.warning("tool calls of an answer are not held to their schemas: %s", reason)
            return
        subject = "The lists of tokens" if self._built is None else "The grammar"
        self._problem = f"{subject} cannot be followed: {reason}"

    def ends_with(self, token_id: int) -> bool:
        """Whether its grammar has an output that ends with this token complete. Waits for the matcher."""
        if self._matcher is None and self._built is not None and self._built.exception() is None:
            self._take()
        return token_id in self._end_token_ids

    def advance(self, token_ids: Sequence[int]) -> Matcher | None:
        """Take more output; returns the matcher, if there is a grammar. Raises GrammarError."""
        if self._matcher is None:
            self._take()
        if token_ids:
            if self._matcher is not None:
                self._matcher.advance(token_ids)
            self.num_taken += len(token_ids)
            self._last.extend(token_ids)
        return self._matcher

    def _take(self) -> None:
        """Wait for the matcher, if there is a grammar, and keep it. Raises GrammarError."""
        if self._built is not None:
            grammars, self._matcher = self._built.result()
            self._end_token_ids = grammars.end_token_ids

    def force(self, matcher: Matcher | None, row: bytes, *, vocab_size: int) -> None:
        """Note what must follow the token that `row` allows, if it is the only one.

        Nothing where lists of tokens have a say: they look at one token at a time. Tokenizers may know tokens that the
        model does not: these are left to a mask, too.
        """
        self.forced = ()
        if matcher is None or self._problem or len(row.strip(b"\0")) > 1:
            return
        if not self._rules.are_silent(num_output=self.num_taken):
            return
        token_ids = matcher.forced()
        if len(token_ids) > 1 and row[token_ids[0] // 8] == 1 << token_ids[0] % 8:
            self.forced = tuple(itertools.takewhile(lambda token_id: token_id < vocab_size, token_ids[1:]))

    def left(self, row: bytes) -> bytes:
        """What may be chosen of the tokens that the grammar allows here; see `TokenRules`. Raises GrammarError.

        Where the lists of tokens leave none, but the text is complete, it ends.
        """
        if self._rules.are_silent(num_output=self.num_taken):
            return row
        tokens = int.from_bytes(row, "little")
        left = self._rules.left(tokens, tuple(self._last))
        if not left:
            left = sum(1 << end for end in self._end_token_ids) & tokens
        if not left:
            raise GrammarError("allowed_token_ids and bad_words leave no token here.")
        return self._rules.not_yet_ending(left, num_output=self.num_taken).to_bytes(len(row), "little")


class Constrained(Protocol):
    """A sequence, as far as this module looks at it."""

    @property
    def constraint(self) -> Constraint | None:
        """What limits its tokens."""
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
        self._row_bytes = 4 * -(-vocab_size // WORD_BITS)
        self._all_tokens = ((1 << vocab_size) - 1).to_bytes(self._row_bytes, "little")
        self._grammars: Future[Grammars] | None = None
        # Building takes up to a second and must not hold up the masks of those that run.
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._prepared: Future[bytes] | None = None
        self._jobs: Sequence[tuple[Constraint, tuple[int, ...]]] = ()
        self._slots: tuple[int, ...] = ()

    def begin(self, sampling: SamplingParams, output: Sequence[int]) -> Constraint:
        """Start to build what limits a sequence that has this output already."""
        rules, built = TokenRules(sampling, vocab_size=self._vocab_size), None
        if sampling.grammar is not None:
            if self._grammars is None:
                self._grammars = self._builder.submit(self._load)
            built = self._builder.submit(_build, self._grammars, sampling.grammar, tuple(output))
        return Constraint(built, rules, output, yields=sampling.grammar_yields)

    def prepare(self, slots: tuple[int, ...], sequences: Sequence[Constrained]) -> None:
        """Start to work out which tokens may come next in these slots, for sequences all of whose tokens are known."""
        self._slots = slots
        self._jobs = [(each.constraint, tuple(_untaken(each))) for each in sequences if each.constraint is not None]
        self._prepared = self._worker.submit(self._work, self._jobs)

    @property
    def has_prepared(self) -> bool:
        """Whether masks were prepared and not taken."""
        return self._prepared is not None

    def masks(self) -> TokenMasks:
        """Wait for what was prepared, and take it; if no thread has begun with it, it is done here."""
        prepared, self._prepared = self._prepared, None
        assert prepared is not None, "nothing was prepared"
        return TokenMasks(self._slots, self._work(self._jobs) if prepared.cancel() else prepared.result())

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
        matchers: list[Matcher | None] = []
        for constraint, token_ids in jobs:
            try:
                matchers.append(constraint.advance(token_ids) if constraint.problem is None else None)
            except GrammarError as error:
                constraint.fail(str(error))
                matchers.append(None)
        made = []
        for (constraint, _), matcher, row in zip(jobs, matchers, self._grammar_rows(matchers), strict=True):
            made.append(self._row(constraint, row))
            constraint.force(matcher, made[-1], vocab_size=self._vocab_size)
        return b"".join(made)

    def _grammar_rows(self, matchers: Sequence[Matcher | None]) -> list[bytes | str]:
        """What grammars allow, or what went wrong; all tokens where there is none."""
        rows: list[bytes | str] = [self._all_tokens] * len(matchers)
        followed = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
        if not followed or self._grammars is None:
            return rows
        words, problems = self._grammars.result().masks([matcher for _, matcher in followed])
        found = memoryview(words)  # a part of an array of bytes would be copied twice
        for (row, _), problem, begin in zip(followed, problems, itertools.count(step=self._row_bytes), strict=False):
            rows[row] = problem or bytes(found[begin : begin + self._row_bytes])
        return rows

    def _row(self, constraint: Constraint, allowed: bytes | str) -> bytes:
        """The row of one constraint, which fails if there is something wrong with it."""
        if constraint.problem is not None:
            return self._all_tokens
        try:
            if isinstance(allowed, str):
                raise GrammarError(allowed)
            return constraint.left(allowed)
        except GrammarError as error:
            constraint.fail(str(error))
            return self._all_tokens


def _build(loading: Future[Grammars], grammar: str, output: tuple[int, ...]) -> tuple[Grammars, Matcher]:
    grammars = loading.result()
    matcher = grammars.matcher(grammar)
    if output:
        matcher.advance(output)
    return grammars, matcher


def _untaken(sequence: Constrained) -> list[int]:
    assert sequence.constraint is not None
    return sequence.token_ids[sequence.num_prompt + sequence.constraint.num_taken :]
