"""Grammars over a model's tokens, by llguidance: which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np

from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.grammar import GrammarError, Matcher
from vllm_mlx.core.kept import Kept

WORD_BITS = 32
MAX_KEPT = 64
"""Built grammars that are kept; building one takes up to a second, copying one microseconds."""
MAX_GRAMMAR_SIZE = 200_000
"""Symbols of a grammar's productions."""
MAX_LEXER_STATES = 50_000
"""Each takes one or two kilobytes."""


class TokenMatcher:
    """A `Matcher` of llguidance."""

    def __init__(self, inner: llguidance.LLMatcher) -> None:
        self.inner = inner

    def advance(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens that were chosen; see `Matcher`."""
        if not self.inner.consume_tokens(list(token_ids)):
            raise GrammarError(_reason(self.inner))

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer itself would write their text; see `Matcher`."""
        found: list[int] = self.inner.compute_ff_tokens()
        return found


class TokenGrammars:
    """`Grammars` of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int) -> None:
        """For logits of that width. Raises GrammarError for a tokenizer that llguidance cannot read."""
        self.end_token_ids = frozenset(token for token in tokenizer.eos_token_ids if 0 <= token < vocab_size)
        if not self.end_token_ids:
            raise GrammarError("the tokenizer has no token that ends a text.")
        self._num_words = -(-vocab_size // WORD_BITS)
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer.serialised(),
                n_vocab=max(vocab_size, tokenizer.vocab_size),
                eos_token=sorted(self.end_token_ids),
            )
        except (ValueError, RuntimeError) as error:
            raise GrammarError(f"the tokenizer cannot be read: {error}") from error
        self._limits = llguidance.LLParserLimits(
            max_grammar_size=MAX_GRAMMAR_SIZE, max_lexer_states=MAX_LEXER_STATES, verbose_errors=False
        )
        self._executor = llguidance.LLExecutor()
        self._built: Kept[str, llguidance.LLMatcher] = Kept(MAX_KEPT)

    def matcher(self, grammar: str) -> TokenMatcher:
        """A matcher at the beginning of a grammar; see `Grammars`."""
        built = self._built.get(grammar)
        if built is None:
            built = self._build(grammar)
            self._built.add(grammar, built)
        return TokenMatcher(built.deep_copy())

    def masks(self, matchers: Sequence[Matcher]) -> tuple[bytearray, tuple[str | None, ...]]:
        """The tokens allowed next; see `Grammars`."""
        inner = [matcher.inner for matcher in matchers if isinstance(matcher, TokenMatcher)]
        words = self._fill(inner)
        cut = words[:, : self._num_words]
        allowing: list[bool] = np.any(cut, axis=1).tolist()
        problems = tuple(
            _reason(matcher) if matcher.is_error() else None if allows else "it allows no token here."
            for matcher, allows in zip(inner, allowing, strict=True)
        )
        return bytearray(np.ascontiguousarray(cut)), problems

    def _build(self, grammar: str) -> llguidance.LLMatcher:
        built = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if built.is_error():
            raise GrammarError(_reason(built))
        words = self._fill([built])
        if built.is_error():
            raise GrammarError(_reason(built))
        if not words.any():
            raise GrammarError("no text matches it.")
        return built

    def _fill(self, matchers: list[llguidance.LLMatcher]) -> np.ndarray[Any, np.dtype[np.int32]]:
        width = -(-self._tokenizer.vocab_size // WORD_BITS)
        words = np.zeros((len(matchers), width), np.int32)
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(rows, words.ctypes.data, 4 * width, len(rows))
        return words


def _reason(matcher: llguidance.LLMatcher) -> str:
    """What llguidance says is wrong: the first paragraph, without its inner state."""
    return matcher.get_error().split("\n<state>")[0].strip() or "it cannot be followed."
