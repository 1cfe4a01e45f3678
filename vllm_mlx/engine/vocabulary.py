"""Token ids that a model does not have."""

from __future__ import annotations

from vllm_mlx.core.prompt import BLOCK_TOKENS, Prompt

MAX_BLOCKS = 4096
"""Whose numbers are remembered."""


class Vocabulary:
    """Looks for token ids outside 0 .. `size` - 1; at a block of prompts (`Prompt.blocks`) once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._checked: set[int] = set()

    def first_outside(self, prompt: Prompt, more: tuple[int, ...] = ()) -> int | None:
        """A token of a prompt, or of what follows it, that there is not; None if there are all."""
        unchecked = (i for i, block in enumerate(prompt.blocks) if block not in self._checked)
        start = next(unchecked, len(prompt.blocks)) * BLOCK_TOKENS
        for token_ids in (prompt.token_ids[start:], more):
            for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
                if not 0 <= token_id < self.size:
                    return token_id
        if len(self._checked) + len(prompt.blocks) > MAX_BLOCKS:
            self._checked.clear()
        self._checked.update(prompt.blocks)
        return None
