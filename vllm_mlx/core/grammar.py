"""The border between the engine and what knows grammars: which tokens may come next, in numbers only.

A grammar is a text that both sides pass on unread (llguidance's serialised form). The API side has checked it before a
sequence is submitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class GrammarError(ValueError):
    """A grammar cannot be built or followed, and why, for the caller."""


class TokenMasks(msgspec.Struct, frozen=True):
    """Which tokens the constrained rows of a step may take."""

    slots: tuple[int, ...]
    """In the order of `Step.constrained`."""
    words: bytes
    """Little-endian int32 [slots, words]: bit i of word w allows token 32 w + i. A row has as many words as the
    vocabulary needs, and allows at least one token."""


class Matcher(Protocol):
    """Where in its grammar one sequence is. Used by one thread at a time."""

    def advance(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens that were chosen. Raises GrammarError if the grammar does not allow them."""
        ...

    def forced(self) -> Sequence[int]:
        """The tokens that must come next, in order, as far as there is no choice; perhaps none."""
        ...


class Grammars(Protocol):
    """Builds matchers for one tokenizer. May be used by several threads."""

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end a text; a grammar allows them where it may end, and nothing behind them."""
        ...

    def matcher(self, grammar: str) -> Matcher:
        """A matcher at the beginning of a grammar. Raises GrammarError; may take a second the first time."""
        ...

    def masks(self, matchers: Sequence[Matcher]) -> tuple[bytearray, tuple[str | None, ...]]:
        """The tokens allowed next, as rows of `TokenMasks.words`, and for each row what went wrong with it, if so."""
        ...


class GrammarsFactory(Protocol):
    """Called once, on a thread of the engine's, when the first constrained sequence comes."""

    def __call__(self, vocab_size: int) -> Grammars:
        """For logits of this width. Raises GrammarError if the tokenizer does not serve."""
        ...
