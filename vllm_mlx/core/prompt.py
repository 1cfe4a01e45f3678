"""What the engine is asked to continue."""

from __future__ import annotations

import msgspec


class Prompt(msgspec.Struct, frozen=True):
    """Token ids of the whole input, special tokens included.

    `salt` takes part in the name of every page: two prompts with different salts never share state.
    """

    token_ids: tuple[int, ...]
    salt: bytes = b""

    def __len__(self) -> int:
        return len(self.token_ids)
