"""What the engine is asked to continue."""

from __future__ import annotations

import hashlib

import msgspec

BLOCK_TOKENS = 512
"""Of a block of a prompt, see `Prompt.blocks`."""


class Prompt(msgspec.Struct, frozen=True):
    """Token ids of the whole input, special tokens included.

    `salt` takes part in the name of every page: two prompts with different salts never share state.
    """

    token_ids: tuple[int, ...]
    salt: bytes = b""
    blocks: tuple[int, ...] = ()
    """Numbers of its first blocks of `BLOCK_TOKENS` tokens. In one process equal numbers mean equal tokens, so that
    what was found out about a block need not be found out again. Not sent between processes; there may be none."""

    def __len__(self) -> int:
        return len(self.token_ids)


def prompt_salt(*, adapter: str = "", tenant: bytes = b"") -> bytes:
    """The salt of a prompt: equal only if all parts are equal. Empty without any, as most prompts are.

    Each part follows its length (4 bytes, big endian), so that no two lists of parts give the same bytes.
    """
    parts = (adapter.encode(), tenant)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts) if any(parts) else b""


def tenant_key(name: str) -> bytes:
    """16 bytes that stand for a tenant's name, which may be a secret."""
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=16, person=b"tenant").digest()
