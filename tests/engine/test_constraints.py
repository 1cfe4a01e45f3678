"""Constrained sequences in a real engine loop: whatever happens to them, each token is one that its grammar allows."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.core.grammar import GrammarError, Matcher
from vllm_mlx.core.messages import FinishReason, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.overlap import Overlap
from vllm_mlx.engine.thread import ThreadEngine
from vllm_mlx.testing.fake import fake_factory

pytestmark = pytest.mark.anyio
VOCAB_SIZE = 100
END, STUCK = 1, 98


@pytest.fixture(params=["starts first", "collects first"], autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of starting a step and waiting for the one before: it changes no token."""
    collects_first = request.param == "collects first"
    monkeypatch.setattr(Overlap, "observe", lambda self, *_: setattr(self, "collects_first", collects_first))


class Counter:
    """Allows token `begin`, then each time the one that is one larger, and the end after `length` tokens."""

    def __init__(self, begin: int, length: int) -> None:
        self.next, self.left = begin, length

    def advance(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if token_id not in self.allowed():
                raise GrammarError(f"{token_id} is not one of {self.allowed()}")
            self.next, self.left = self.next + 1, self.left - 1

    def allowed(self) -> list[int]:
        return [self.next] if self.left > 0 else [END]

    def forced(self) -> list[int]:
        return [*range(self.next, min(STUCK, self.next + self.left)), *([] if self.next + self.left > STUCK else [END])]


class Counters:
    """Grammars 'begin length'."""

    end_token_ids = frozenset({END})

    def matcher(self, grammar: str) -> Counter:
        if grammar == "broken":
            raise GrammarError("it is broken")
        return Counter(*map(int, grammar.split()))

    def masks(self, matchers: Sequence[Matcher]) -> tuple[bytearray, tuple[str | None, ...]]:
        rows, problems = bytearray(), []
        for matcher in matchers:
            assert isinstance(matcher, Counter)
            bits = sum(1 << token for token in matcher.allowed())
            rows += bits.to_bytes(16, "little")
            problems.append("stuck" if matcher.next == STUCK else None)
        return rows, tuple(problems)


def submit(name: str, grammar: str | None, **given: Any) -> Submit:
    resume = given.pop("resume", ())
    sampling = SamplingParams(**{"seed": 1, "max_tokens": 40, "stop_token_ids": (END,), "grammar": grammar, **given})
    return Submit(name, Prompt((5, 6, 7, ord(name[0]) % VOCAB_SIZE)), sampling, resume_token_ids=resume)


async def answer(engine: ThreadEngine, wanted: Submit) -> tuple[list[int], FinishReason, str | None]:
    tokens: list[int] = []
    async for output in engine.generate(wanted):
        tokens += output.token_ids
        if output.finish:
            return tokens, output.finish, output.message
    raise AssertionError("no end")


async def serve(
    *submits: Submit, grammars: Callable[[int], Any] | None = lambda _: Counters(), **given: Any
) -> list[tuple[list[int], FinishReason, str | None]]:
    num_pages = given.pop("num_pages", 64)
    factory = fake_factory(vocab_size=VOCAB_SIZE, num_pages=num_pages, page_size=4)
    engine = ThreadEngine(factory, Config(**given), grammars=grammars)
    await engine.start()
    try:
        return list(await asyncio.gather(*(answer(engine, one) for one in submits)))
    finally:
        await engine.stop()


async def test_a_constrained_sequence_follows_its_grammar_and_ends_with_it() -> None:
    assert await serve(submit("a", "10 5")) == [([10, 11, 12, 13, 14, END], FinishReason.STOP, None)]


async def test_neighbours_change_nothing() -> None:
    wanted = [submit("a", "10 9"), submit("b", None), submit("c", "30 4"), submit("d", None), submit("e", "50 12")]
    together = await serve(*wanted)
    assert together == [(await serve(one))[0] for one in wanted]
    assert together[2][0] == [30, 31, 32, 33, END]


async def test_a_preempted_sequence_goes_on_in_its_grammar() -> None:
    wanted = [submit(name, f"{10 * i} 20", max_tokens=30) for i, name in enumerate("bcdef", 2)]
    found = await serve(*wanted, num_pages=16)
    assert [tokens for tokens, _, _ in found] == [[*range(10 * i, 10 * i + 20), END] for i in range(2, 7)]


async def test_a_resumed_sequence_goes_on_in_its_grammar() -> None:
    [(tokens, reason, _)] = await serve(submit("a", "10 5", resume=(10, 11)))
    assert (tokens, reason) == ([12, 13, 14, END], FinishReason.STOP)


async def test_min_tokens_and_ignored_ends_yield_to_the_grammar() -> None:
    wanted = submit("a", "10 3", min_tokens=8), submit("b", "20 2", stop_token_ids=())
    assert [tokens for tokens, _, _ in await serve(*wanted)] == [[10, 11, 12, END], [20, 21, END]]


async def test_max_tokens_ends_a_grammar_early() -> None:
    assert await serve(submit("a", "10 9", max_tokens=3)) == [([10, 11, 12], FinishReason.LENGTH, None)]


@pytest.mark.parametrize(
    ("grammar", "resume", "reason"), [("broken", (), "broken"), ("96 9", (), "stuck"), ("10 5", (50,), "50 is not")]
)
async def test_a_grammar_that_fails_ends_its_own_sequence_alone(
    grammar: str, resume: tuple[int, ...], reason: str
) -> None:
    failed, other = await serve(submit("a", grammar, resume=resume), submit("b", "10 5"))
    assert failed[1] is FinishReason.ERROR
    assert reason in (failed[2] or "")
    assert other[0] == [10, 11, 12, 13, 14, END]


@pytest.mark.parametrize("grammar", ["broken", "96 9"])
async def test_a_grammar_that_yields_is_dropped_where_it_fails(grammar: str) -> None:
    free, yielding, other = await serve(
        submit("a", None), submit("a2", grammar, grammar_yields=True), submit("b", "10 5", grammar_yields=True)
    )
    assert yielding[1] is FinishReason.LENGTH
    assert len(yielding[0]) == 40
    assert other == ([10, 11, 12, 13, 14, END], FinishReason.STOP, None)
    if grammar == "broken":
        assert yielding == free


async def test_an_engine_without_a_tokenizer_goes_on_without_a_grammar_that_yields() -> None:
    [free, yielding] = await serve(submit("a", None), submit("a2", "10 5", grammar_yields=True), grammars=None)
    assert yielding == free


async def test_an_engine_without_a_tokenizer_says_so() -> None:
    [(tokens, reason, message)] = await serve(submit("a", "10 5"), grammars=None)
    assert (tokens, reason) == ([], FinishReason.ERROR)
    assert "tokenizer" in (message or "")


async def test_closing_a_constrained_stream_leaves_the_others_alone() -> None:
    factory = fake_factory(vocab_size=VOCAB_SIZE, num_pages=64, page_size=4)
    engine = ThreadEngine(factory, Config(), grammars=lambda _: Counters())
    await engine.start()
    gone = engine.generate(submit("a", "10 30"))
    await anext(gone)
    other = asyncio.create_task(answer(engine, submit("b", "40 20")))
    await gone.aclose()
    assert (await other)[0] == [*range(40, 60), END]
    await engine.stop()


async def test_only_allowed_tokens_are_chosen() -> None:
    wanted = submit("a", None, allowed_token_ids=(7, 8)), submit("b", None)
    (tokens, reason, _), other = await serve(*wanted)
    assert (len(tokens), reason) == (40, FinishReason.LENGTH)
    assert set(tokens) <= {7, 8}
    assert other == (await serve(wanted[1]))[0]


async def test_allowed_tokens_may_end_the_text() -> None:
    [(tokens, reason, _)] = await serve(submit("a", None, allowed_token_ids=(7, END), min_tokens=3))
    assert reason is FinishReason.STOP
    assert len(tokens) > 3
    assert tokens == [*([7] * (len(tokens) - 1)), END]


@pytest.mark.parametrize("resume", [(), (7, 8)])
async def test_the_last_token_of_a_bad_word_does_not_follow_the_others(resume: tuple[int, ...]) -> None:
    words = ((7, 8, 7), (7, 7), (8, 8), (3,))
    given: dict[str, Any] = {"allowed_token_ids": (3, 7, 8, 9), "bad_word_ids": words, "seed": 5, "resume": resume}
    [(tokens, _, _)] = await serve(submit("a", None, **given))
    tokens = [*resume, *tokens]
    assert set(tokens) == {7, 8, 9}
    pairs = set(itertools.pairwise(tokens))
    assert (7, 8) in pairs
    assert not pairs & {(7, 7), (8, 8)}
    assert (7, 8, 7) not in zip(tokens, tokens[1:], tokens[2:], strict=False)


async def test_lists_of_tokens_and_a_grammar_hold_together() -> None:
    ends, bad = submit("a", "10 3", bad_word_ids=((11, END), (END,))), submit("b", "10 3", bad_word_ids=((10, 11),))
    found = await serve(ends, bad)
    assert found[0] == ([10, 11, 12, END], FinishReason.STOP, None)
    assert (found[1][0], found[1][1]) == ([10], FinishReason.ERROR)
    assert "bad_words" in (found[1][2] or "")


async def test_lists_that_leave_no_token_end_the_sequence_with_an_error() -> None:
    [(tokens, reason, message)] = await serve(submit("a", None, allowed_token_ids=(7,), bad_word_ids=((7, 7),)))
    assert (tokens, reason) == ([7], FinishReason.ERROR)
    assert "allowed_token_ids" in (message or "")
