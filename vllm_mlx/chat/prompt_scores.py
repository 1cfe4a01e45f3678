"""Log-probabilities of a prompt's tokens: gathered from the engine's outputs, told once, before anything else."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.events import PromptScored, PromptToken, TopLogprob
from vllm_mlx.core.messages import Output
from vllm_mlx.core.step import TokenLogprobs


class PromptScores:
    """Of one choice."""

    def __init__(self, tokenizer: Tokenizer, *, choice: int, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._choice = choice
        self._prompt_ids = prompt_ids
        self._tokens = [self._token(prompt_ids[0], None, None)]
        self._is_told = False

    def read(self, output: Output) -> list[PromptScored]:
        """Take in an output; the event comes with the first tokens or the end. What an engine repeats is left out."""
        found = output.prompt_logprobs
        if found is not None:
            scored = zip(found.logprobs, found.ranks, strict=True)
            for position, (logprobs, rank) in enumerate(scored, start=found.start):
                if position == len(self._tokens):
                    self._tokens.append(self._token(self._prompt_ids[position], logprobs, rank))
        if self._is_told or not (output.token_ids or output.finish is not None):
            return []
        self._is_told = True
        return [PromptScored(self._choice, tuple(self._tokens))]

    def _token(self, token_id: int, logprobs: TokenLogprobs | None, rank: int | None) -> PromptToken:
        text, token_bytes = self._tokenizer.token_text, self._tokenizer.token_bytes
        is_text = token_id not in self._tokenizer.special_ids
        if logprobs is None:
            return PromptToken(token_id, text(token_id), token_bytes(token_id), is_text=is_text)
        top = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        return PromptToken(
            token_id,
            text(token_id),
            token_bytes(token_id),
            logprobs.logprob,
            rank,
            logprobs.top_ids,
            tuple(TopLogprob(text(top_id), token_bytes(top_id), value) for top_id, value in top),
            is_text,
        )
