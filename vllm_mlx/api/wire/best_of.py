"""Of several candidates for each prompt, the most likely ones."""

from __future__ import annotations

import math

import msgspec

from vllm_mlx.chat.collect import Collected, CollectedChoice


class Best(msgspec.Struct, frozen=True):
    """Keep `shown` of `candidates` choices of each prompt."""

    candidates: int
    shown: int

    def of(self, collected: Collected) -> tuple[CollectedChoice, ...]:
        """Those with the highest log-probability per token, best first, prompt by prompt."""
        found: list[CollectedChoice] = []
        for begin in range(0, len(collected.choices), self.candidates):
            candidates = collected.choices[begin : begin + self.candidates]
            found += sorted(candidates, key=_mean_logprob, reverse=True)[: self.shown]
        return tuple(found)


def _mean_logprob(choice: CollectedChoice) -> float:
    values = [token.logprob for token in choice.tokens]
    return sum(values) / len(values) if values else -math.inf
