"""What a request's own lists of tokens leave to choose from: `allowed_token_ids`, `bad_word_ids`, `min_tokens`.

Sets of tokens are whole numbers with a bit for each token, lowest first: the words of `TokenMasks`, read as one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from vllm_mlx.core.sampling import SamplingParams


class TokenRules:
    """The rules of one sequence, made ready so that a step costs no more than a look at its last tokens."""

    def __init__(self, sampling: SamplingParams, *, vocab_size: int) -> None:
        every = (1 << vocab_size) - 1
        singles = [word[0] for word in sampling.bad_word_ids if len(word) == 1]
        allowed = every if sampling.allowed_token_ids is None else _set_of(sampling.allowed_token_ids)
        self._allowed = allowed & every & ~_set_of(singles)
        self._longer: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        for word in sampling.bad_word_ids:
            if len(word) > 1:
                self._longer[word[-2]].append(word)
        self._has_lists = sampling.allowed_token_ids is not None or bool(sampling.bad_word_ids)
        self._withheld = _set_of(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
        self.num_remembered = max((len(word) - 1 for word in sampling.bad_word_ids), default=0)
        """How many of the last tokens of the output it looks at."""

    def are_silent(self, *, num_output: int) -> bool:
        """Whether they leave any set of tokens as it is, behind an output of so many."""
        return not self._has_lists and num_output >= self._min_tokens

    def left(self, tokens: int, output: Sequence[int]) -> int:
        """Those of `tokens` that may follow this end of an output; perhaps none."""
        left = tokens & self._allowed
        if output:
            words = self._longer.get(output[-1], ())
            left &= ~_set_of([word[-1] for word in words if tuple(output[1 - len(word) :]) == word[:-1]])
        return left

    def not_yet_ending(self, tokens: int, *, num_output: int) -> int:
        """Those of `tokens` that do not end an output too early; all of them if there are no others."""
        if num_output >= self._min_tokens:
            return tokens
        return tokens & ~self._withheld or tokens


def _set_of(token_ids: Collection[int]) -> int:
    """In bytes first: an allowed half of a large vocabulary is as many tokens as its number has bits."""
    found = bytearray(max(token_ids, default=0) // 8 + 1)
    for token_id in token_ids:
        found[token_id // 8] |= 1 << token_id % 8
    return int.from_bytes(found, "little")
