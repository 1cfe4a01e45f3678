"""Reasoning that is ended by force, over a real engine: the model goes on from the closing mark."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from vllm_mlx.chat.collect import Collected, collect
from vllm_mlx.chat.grammars import TokenGrammars
from vllm_mlx.chat.reasoning import reasoning_format
from vllm_mlx.chat.service import ChatService
from vllm_mlx.chat.thinking import CLOSING_SENTENCE, closing_text
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.chat import ChatRequest, Message
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import FinishReason
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.shape import OutputShape
from vllm_mlx.engine.thread import ThreadEngine
from vllm_mlx.testing.fake import fake_factory

pytestmark = pytest.mark.anyio

EOS = 2


class Ponderer:
    """A script: thinks until its reasoning is closed, then answers and ends."""

    def __init__(self, tokenizer: Tokenizer, *, in_circles: bool = False) -> None:
        self._open = tokenizer.encode("<think>", add_special_tokens=False)
        self._close = tokenizer.encode("</think>\n\n", add_special_tokens=False)
        self._answer = (*tokenizer.encode("Paris", add_special_tokens=False), EOS)
        self._thoughts = tokenizer.encode("so on and" if in_circles else "abcdefghij", add_special_tokens=False)
        self._in_circles = in_circles

    def __call__(self, tokens: tuple[int, ...]) -> int:
        close = find(tokens, self._close)
        if close is not None:
            return self._answer[min(len(tokens) - close - len(self._close), len(self._answer) - 1)]
        begun = find(tokens, self._open)
        if begun is None:
            done = next(n for n in range(len(self._open), -1, -1) if tokens[len(tokens) - n :] == self._open[:n])
            return self._open[done]
        number = len(tokens) - begun
        step = number if self._in_circles else number * number // 7
        return self._thoughts[step % len(self._thoughts)]


def find(tokens: tuple[int, ...], piece: tuple[int, ...]) -> int | None:
    places = range(len(tokens) - len(piece), -1, -1)
    return next((i for i in places if tokens[i : i + len(piece)] == piece), None)


Ask = Callable[..., Any]


@pytest.fixture
async def ask(byte_level: Tokenizer) -> AsyncIterator[Ask]:
    async with AsyncExitStack() as stack:

        def grammars(vocab_size: int) -> TokenGrammars:
            return TokenGrammars(byte_level, vocab_size=vocab_size)

        async def answer(
            *,
            in_circles: bool = False,
            budget: int | None = None,
            settings: Any = None,
            output: OutputShape | None = None,
            **sampling: Any,
        ) -> Collected:
            script = Ponderer(byte_level, in_circles=in_circles)
            factory = fake_factory(script=script, vocab_size=byte_level.vocab_size, max_model_len=4096)
            config = Config(reasoning_parser="qwen3", **(settings or {}))
            engine = ThreadEngine(factory, config, grammars=grammars)
            service = ChatService(engine, byte_level, config=config)
            await engine.start()
            stack.push_async_callback(engine.stop)
            request = ChatRequest(
                "r",
                (Message("user", "Hi"),),
                SamplingParams(seed=1, **sampling),
                thinking_budget=budget,
                output=output,
            )
            async with await service.chat(request) as events:
                return await collect(events)

        yield answer


async def test_budget_closes_reasoning_and_the_answer_follows(ask: Ask, byte_level: Tokenizer) -> None:
    [choice] = (await ask(budget=40, max_tokens=1000)).choices
    assert choice.text.strip() == "Paris"
    assert choice.reason is FinishReason.STOP
    assert choice.reasoning.rstrip().endswith(CLOSING_SENTENCE.strip())
    own = choice.reasoning.removesuffix(CLOSING_SENTENCE).rstrip("\n")
    closing = byte_level.encode(closing_text(reasoning_format("qwen3")) or "", add_special_tokens=False)
    assert 40 <= choice.usage.reasoning_tokens <= 40 + len(closing)
    assert 30 <= len(byte_level.encode(own, add_special_tokens=False)) <= 40


async def test_server_s_budget_holds_for_requests_without_one(ask: Ask) -> None:
    shorter = {"default_thinking_token_budget": 20}
    one = await ask(max_tokens=1000, settings=shorter)
    other = await ask(budget=60, max_tokens=1000, settings=shorter)
    assert one.usage.reasoning_tokens < other.usage.reasoning_tokens
    assert one.choices[0].text.strip() == other.choices[0].text.strip() == "Paris"


async def test_reasoning_in_circles_is_closed(ask: Ask) -> None:
    broken = await ask(in_circles=True, max_tokens=3000)
    assert broken.choices[0].text.strip() == "Paris"
    endless = await ask(in_circles=True, max_tokens=600, settings={"break_thinking_loops": False})
    assert endless.choices[0].text == ""
    assert endless.choices[0].reason is FinishReason.LENGTH


async def test_budget_that_leaves_no_room_for_an_answer_changes_nothing(ask: Ask) -> None:
    [choice] = (await ask(budget=30, max_tokens=40)).choices
    assert choice.reason is FinishReason.LENGTH
    assert choice.usage.completion_tokens == 40
    assert CLOSING_SENTENCE.strip() not in choice.reasoning


async def test_every_choice_has_a_budget_of_its_own(ask: Ask) -> None:
    collected = await ask(budget=25, n=3, max_tokens=500)
    assert [choice.text.strip() for choice in collected.choices] == ["Paris"] * 3
    assert collected.usage.cached_tokens <= collected.usage.prompt_tokens


@pytest.mark.parametrize(("budget", "in_circles"), [(40, False), (40, True), (None, True)])
async def test_shape_of_the_answer_holds_behind_reasoning_that_was_closed(
    ask: Ask, budget: int | None, in_circles: bool
) -> None:
    shape = OutputShape("choice", ("yes", "no"), "guided_choice")
    [choice] = (await ask(budget=budget, in_circles=in_circles, max_tokens=1500, output=shape)).choices
    assert choice.reasoning.rstrip().endswith(CLOSING_SENTENCE.strip())
    assert (choice.text, choice.reason) in {("yes", FinishReason.STOP), ("no", FinishReason.STOP)}


async def test_shape_holds_where_a_budget_of_nothing_closes_reasoning_at_once(ask: Ask) -> None:
    shape = OutputShape("choice", ("yes", "no"), "guided_choice")
    [choice] = (await ask(budget=0, max_tokens=300, output=shape)).choices
    assert choice.text in ("yes", "no")
