"""Schemas of every kind that can be enforced, walked at random: whatever the masks lead to is valid."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fixtures_text import EOS_ID, write_tokenizer
from schema_corpus import Case, cases, check

from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.grammars import TokenGrammars, TokenMatcher
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.shape import OutputShape

VOCAB_SIZE = 640
CASES = cases()
NUM_WALKS = 4
NUM_FREE = 24
"""Tokens of a walk after which it takes what closes something where it can."""
MAX_TOKENS = 1500
NEED_LUCK = {"pattern-unanchored", "pattern-ends"}
"""Whose texts only end once a certain word came up in them."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


def shape_of(case: Case, *, is_strict: bool = True) -> OutputShape:
    return OutputShape("json_schema", case.schema, "schema", is_strict)


def test_the_corpus_is_large_and_its_names_are_its_own() -> None:
    assert len([case for case in CASES if case.refused is None]) >= 200
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.anyio
async def test_every_schema_is_enforced_or_refused_by_its_keyword(tokenizer: Tokenizer) -> None:
    constrainer, found = Constrainer(tokenizer), {}
    for case in CASES:
        try:
            await constrainer.grammar(shape_of(case), vocab_size=VOCAB_SIZE)
            found[case.name] = None
        except InvalidRequest as error:
            found[case.name] = (error.param or "").removeprefix("schema.")
    assert found == {case.name: case.refused for case in CASES}


class Walk:
    """A text in the making, token after token."""

    def __init__(self, case: Case, matcher: TokenMatcher, seed: str) -> None:
        self.case, self.matcher = case, matcher
        self.token_ids: list[int] = []
        self.num_foretold = 0
        self._forced: list[int] = []
        self._random = random.Random(seed)

    def go_on(self, allowed: list[int], closing: list[int]) -> bool:
        """Take one token; False if it ended the text."""
        self._look_ahead(allowed)
        closes = len(self.token_ids) >= NUM_FREE and self._random.random() < 0.9
        liked = [token for token in closing if token in allowed] if closes else []
        token = liked[0] if liked else self._random.choice(allowed)
        if token == EOS_ID:
            return False
        self.matcher.advance([token])
        self.token_ids.append(token)
        return True

    def _look_ahead(self, allowed: list[int]) -> None:
        """What was forced is what masks leave, token by token."""
        if self._forced:
            assert allowed == self._forced[:1]
            self.num_foretold += 1
        forced = self.matcher.forced() if len(allowed) == 1 else []
        assert forced[:1] == [token for token in allowed if forced]
        assert forced[1 : len(self._forced)] == self._forced[1:]
        self._forced = forced[1:]


@pytest.mark.anyio
async def test_random_walks_give_valid_answers(tokenizer: Tokenizer) -> None:
    grammars, constrainer = TokenGrammars(tokenizer, vocab_size=VOCAB_SIZE), Constrainer(tokenizer)
    walks = []
    for case in (case for case in CASES if case.refused is None):
        grammar = await constrainer.grammar(shape_of(case), vocab_size=VOCAB_SIZE)
        walks += [Walk(case, grammars.matcher(grammar), f"{case.name} {i}") for i in range(NUM_WALKS)]
    closing = [EOS_ID, *(tokenizer.encode(text, add_special_tokens=False)[0] for text in '"@}]')]
    going, ended = walks, []
    for _ in range(MAX_TOKENS):
        words, problems = grammars.masks([walk.matcher for walk in going])
        assert not any(problems), [walk.case.name for walk, problem in zip(going, problems, strict=True) if problem]
        bits = np.unpackbits(np.frombuffer(words, np.uint8).reshape(len(going), -1), axis=1, bitorder="little")
        steps = [walk.go_on(np.flatnonzero(row).tolist(), closing) for walk, row in zip(going, bits, strict=True)]
        ended += [walk for walk, goes_on in zip(going, steps, strict=True) if not goes_on]
        going = [walk for walk, goes_on in zip(going, steps, strict=True) if goes_on]
        if not going:
            break
    assert {walk.case.name for walk in going} <= NEED_LUCK
    assert sum(walk.num_foretold for walk in walks) > len(walks)
    for walk in ended:
        check(walk.case, tokenizer.decode(walk.token_ids))
