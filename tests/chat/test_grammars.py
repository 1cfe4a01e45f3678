"""Grammars over a small tokenizer."""

from __future__ import annotations

import json

import llguidance
import numpy as np
import pytest
from fixtures_text import EOS_ID, write_tokenizer

from vllm_mlx.chat.grammars import TokenGrammars
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.grammar import GrammarError

VOCAB_SIZE = 650
"""Wider than the tokenizer, as logits often are."""
OBJECT = json.dumps({"grammars": [{"json_schema": {"type": "object"}}]})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> TokenGrammars:
    return TokenGrammars(tokenizer, vocab_size=VOCAB_SIZE)


def allowed(grammars: TokenGrammars, *matchers: object) -> list[set[int]]:
    words, problems = grammars.masks(matchers)  # type: ignore[arg-type]
    assert not any(problems), problems
    rows = np.frombuffer(words, np.uint8).reshape(len(matchers), -1)
    return [set(np.flatnonzero(np.unpackbits(row, bitorder="little")).tolist()) for row in rows]


def test_only_tokens_that_the_grammar_allows_are_in_a_mask(grammars: TokenGrammars, tokenizer: Tokenizer) -> None:
    [found] = allowed(grammars, grammars.matcher(OBJECT))
    assert found
    assert {tokenizer.token_bytes(token)[:1] for token in found} == {b"{"}


def test_rows_of_several_matchers_stand_in_order(grammars: TokenGrammars, tokenizer: Tokenizer) -> None:
    regex = llguidance.LLMatcher.grammar_from_regex("a|b")
    one, two = allowed(grammars, grammars.matcher(regex), grammars.matcher(OBJECT))
    assert {tokenizer.token_text(token) for token in one} == {"a", "b"}
    assert two != one


def test_a_complete_text_allows_the_end_alone(grammars: TokenGrammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.matcher(OBJECT)
    matcher.advance(tokenizer.encode('{"fox": 1}', add_special_tokens=False))
    assert allowed(grammars, matcher) == [{EOS_ID}]


def test_a_text_without_a_choice_is_foretold_as_the_tokenizer_writes_it(
    grammars: TokenGrammars, tokenizer: Tokenizer
) -> None:
    text = "the fox and the river"
    matcher = grammars.matcher(llguidance.LLMatcher.grammar_from_regex(f"[ab]{text}[xy]"))
    assert list(matcher.forced()) == []
    matcher.advance(tokenizer.encode("a", add_special_tokens=False))
    forced = list(matcher.forced())
    assert len(forced) > 1
    assert text.startswith(tokenizer.decode(forced))
    assert list(tokenizer.encode(text, add_special_tokens=False))[: len(forced)] == forced
    matcher.advance(forced[:1])
    assert list(matcher.forced()) == forced[1:]


def test_a_matcher_leaves_others_of_its_grammar_alone(grammars: TokenGrammars, tokenizer: Tokenizer) -> None:
    first = grammars.matcher(OBJECT)
    before = allowed(grammars, grammars.matcher(OBJECT))
    first.advance(tokenizer.encode('{"', add_special_tokens=False))
    assert allowed(grammars, grammars.matcher(OBJECT)) == before != allowed(grammars, first)


def test_a_token_that_is_not_allowed_is_an_error(grammars: TokenGrammars, tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarError):
        grammars.matcher(OBJECT).advance(tokenizer.encode("fox", add_special_tokens=False))


@pytest.mark.parametrize("grammar", ["start: (", json.dumps({"grammars": [{"lark_grammar": "start: nowhere"}]})])
def test_a_broken_grammar_is_an_error(grammars: TokenGrammars, grammar: str) -> None:
    with pytest.raises(GrammarError, match=r"\w"):
        grammars.matcher(grammar)


def test_a_grammar_that_nothing_matches_is_an_error(grammars: TokenGrammars) -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    with pytest.raises(GrammarError):
        grammars.matcher(json.dumps({"grammars": [{"json_schema": schema}]}))
