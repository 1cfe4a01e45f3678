"""Prompts on their way to an engine process: in blocks of tokens, each encoded by itself.

Many prompts begin alike: the next turn of a chat, the requests of one application. The engine decodes a block that it
had before by looking its bytes up, which takes a twentieth of the time of making numbers of them, and gives it the
number that it had then (`Prompt.blocks`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import msgspec

from vllm_mlx.core.kept import Kept
from vllm_mlx.core.messages import Submit, ToEngine
from vllm_mlx.core.prompt import BLOCK_TOKENS, Prompt

MAX_BLOCKS = 512
"""That are remembered: a quarter of a million tokens, some ten megabytes."""


class SentSubmit(msgspec.Struct, frozen=True, tag=True):
    """A `Submit` on its way."""

    blocks: tuple[bytes, ...]
    """The prompt's whole blocks, as msgpack."""
    submit: Submit
    """Whose prompt has only the tokens behind them."""


def sent(message: ToEngine) -> ToEngine | SentSubmit:
    """The form in which a message is sent; most are sent as they are."""
    if not isinstance(message, Submit) or len(message.prompt) < BLOCK_TOKENS:
        return message
    token_ids = message.prompt.token_ids
    end = len(token_ids) // BLOCK_TOKENS * BLOCK_TOKENS
    parts = (token_ids[start : start + BLOCK_TOKENS] for start in range(0, end, BLOCK_TOKENS))
    blocks = tuple(map(msgspec.msgpack.encode, parts))
    rest = msgspec.structs.replace(message.prompt, token_ids=token_ids[end:], blocks=())
    return SentSubmit(blocks, msgspec.structs.replace(message, prompt=rest))


class _Block(NamedTuple):
    number: int
    token_ids: tuple[int, ...]


class _Joined(NamedTuple):
    """The blocks of a prompt, one after the other."""

    blocks: tuple[bytes, ...] = ()
    numbers: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()


class BlockReader:
    """Puts messages together again. Remembers the blocks used last, and those of the last prompt as a whole."""

    def __init__(self, *, max_blocks: int = MAX_BLOCKS) -> None:
        self._numbers = itertools.count()
        self._decode = msgspec.msgpack.Decoder(tuple[int, ...]).decode
        self._known: Kept[bytes, _Block] = Kept(max_blocks)
        self._last = _Joined()

    def __len__(self) -> int:
        return len(self._known)

    def read(self, message: ToEngine | SentSubmit) -> ToEngine:
        """The message that `sent` was given; the blocks of its prompt have numbers now."""
        if not isinstance(message, SentSubmit):
            return message
        if message.blocks != self._last.blocks:
            self._last = self._join(message.blocks)
        rest = message.submit.prompt
        prompt = Prompt(self._last.token_ids + rest.token_ids, rest.salt, self._last.numbers)
        return msgspec.structs.replace(message.submit, prompt=prompt)

    def _join(self, encoded: tuple[bytes, ...]) -> _Joined:
        blocks = list(map(self._block, encoded))
        token_ids = itertools.chain.from_iterable(block.token_ids for block in blocks)
        return _Joined(encoded, tuple(block.number for block in blocks), tuple(token_ids))

    def _block(self, encoded: bytes) -> _Block:
        found = self._known.get(encoded)
        if found is None:
            found = _Block(next(self._numbers), self._decode(encoded))
            self._known.add(encoded, found)
        return found
