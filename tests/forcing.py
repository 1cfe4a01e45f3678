"""Grammars that are lists of tokens, with gaps: how much of an output is forced is up to the test."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from turns import Turns, Watched

from vllm_mlx.core.config import Config
from vllm_mlx.core.grammar import GrammarError, Matcher
from vllm_mlx.core.messages import FinishReason, Output, Submit
from vllm_mlx.core.step import Runner, Step
from vllm_mlx.engine.constraints import Constraints
from vllm_mlx.engine.rounds import Rounds

MAX_FORCED = 20
"""Most tokens that a matcher names at once."""


class ScriptMatcher:
    """Where in its script one sequence is."""

    def __init__(self, script: Sequence[int | None], *, vocab_size: int, end: int) -> None:
        self._script, self._vocab_size, self._end = script, vocab_size, end
        self._at = 0

    @property
    def allowed(self) -> Sequence[int]:
        """Any token but the end's in a gap, the end where the script has ended."""
        only = self._only(self._at)
        return [token for token in range(self._vocab_size) if token != self._end] if only is None else [only]

    def advance(self, token_ids: Sequence[int]) -> None:
        """See `Matcher`."""
        for token_id in token_ids:
            if token_id not in self.allowed:
                raise GrammarError(f"{token_id} is not one of {self.allowed}")
            self._at += 1

    def forced(self) -> list[int]:
        """See `Matcher`."""
        found: list[int] = []
        while len(found) < MAX_FORCED and (token := self._only(self._at + len(found))) is not None:
            found.append(token)
            if token == self._end:
                break
        return found

    def _only(self, at: int) -> int | None:
        return self._script[at] if at < len(self._script) else self._end


class Scripts:
    """Grammars like '5 6 ? 7': these tokens, any in place of the question mark, then the end."""

    def __init__(self, vocab_size: int, *, end: int) -> None:
        self._vocab_size, self._end = vocab_size, end
        self.end_token_ids = frozenset({end})

    def matcher(self, grammar: str) -> ScriptMatcher:
        """See `Grammars`."""
        script = [None if word == "?" else int(word) for word in grammar.split()]
        return ScriptMatcher(script, vocab_size=self._vocab_size, end=self._end)

    def masks(self, matchers: Sequence[Matcher]) -> tuple[bytearray, tuple[str | None, ...]]:
        """See `Grammars`."""
        rows, size = bytearray(), 4 * -(-self._vocab_size // 32)
        for matcher in matchers:
            assert isinstance(matcher, ScriptMatcher)
            rows += sum(1 << token for token in matcher.allowed).to_bytes(size, "little")
        return rows, (None,) * len(matchers)


class Loop:
    """The engine's rounds, on the calling thread; all steps are kept."""

    def __init__(
        self, runner: Runner, config: Config, *, end: int, chunked: bool = True, collects_first: bool = False
    ) -> None:
        self.runner = runner
        info = msgspec.structs.replace(runner.info, chunked_decode=runner.info.chunked_decode and chunked)
        self.constraints = Constraints(lambda size: Scripts(size, end=end), vocab_size=info.vocab_size)
        self.scheduler = Watched(info, config, constraints=self.constraints, clock=lambda: 0.0)
        self.outputs: list[Output] = []
        self.rounds = Rounds(self.scheduler, runner, self.constraints, tell=self._tell, overlap=Turns([collects_first]))

    @property
    def steps(self) -> list[Step]:
        """All that were planned."""
        return self.scheduler.steps

    def round(self) -> None:
        """One round."""
        self.rounds.round()
        self._tell()

    def _tell(self) -> None:
        self.outputs += self.scheduler.take_outputs()

    def run(self, *submits: Submit) -> dict[str, tuple[int, ...]]:
        """The tokens of each sequence."""
        with self.constraints:
            for submit in submits:
                self.scheduler.submit(submit)
            while self.scheduler.has_work or self.rounds.has_in_flight:
                self.round()
        tokens: dict[str, tuple[int, ...]] = {}
        for output in self.outputs:
            assert output.finish is not FinishReason.ERROR, output.message
            tokens[output.request_id] = (*tokens.get(output.request_id, ()), *output.token_ids)
        return tokens

    @property
    def finish(self) -> FinishReason | None:
        """Of the last output."""
        return self.outputs[-1].finish

    @property
    def num_rows(self) -> list[int]:
        """Decode rows of each step that has any."""
        return [len(step.decodes) for step in self.steps if step.decodes]
