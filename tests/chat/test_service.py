"""Requests over a real engine: text in, events out, and refusals before anything runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from vllm_mlx.chat.collect import collect
from vllm_mlx.chat.render import ChatTemplate
from vllm_mlx.chat.service import ChatService
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.chat import ChatRequest, CompletionRequest, Message
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import (
    ContextLengthExceeded,
    EngineFailure,
    InvalidRequest,
    OutputLimitExceeded,
    RequestTimeout,
    ServerBusy,
)
from vllm_mlx.core.events import TextDelta
from vllm_mlx.core.messages import EngineState, FinishReason
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.thread import ThreadEngine
from vllm_mlx.testing.fake import FakeFactory, fake_factory

pytestmark = pytest.mark.anyio

EOS = 2
MAX_LEN = 256


class Answer:
    """A script: the answer after any prompt, then the end token, or the answer again for ever."""

    def __init__(self, token_ids: tuple[int, ...], *, repeats: bool = False) -> None:
        self._token_ids = token_ids
        self._repeats = repeats

    def __call__(self, tokens: tuple[int, ...]) -> int:
        answer = self._token_ids
        done = next(n for n in range(len(answer), -1, -1) if tokens[len(tokens) - n :] == answer[:n])
        if done == len(answer):
            return answer[0] if self._repeats else EOS
        return answer[done]


class Server:
    """A service over an engine on a thread with a fake runner."""

    def __init__(self, tokenizer: Tokenizer, factory: FakeFactory, config: Config) -> None:
        self.factory = factory
        self.engine = ThreadEngine(factory, config)
        self.service = ChatService(self.engine, tokenizer, config=config)

    async def idle(self) -> None:
        """Wait until no sequence is left in the engine."""
        runner = self.factory.runner
        assert runner is not None
        async with asyncio.timeout(10):
            while runner.live_slots or self.engine.status().stats.num_waiting:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.002)


Serve = Callable[..., Any]
"""(script or None, runner's options, settings) -> a started Server."""


@pytest.fixture
async def serve(byte_level: Tokenizer) -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def start(script: Any = None, *, step_s: float = 0.0, **settings: Any) -> Server:
            factory = fake_factory(
                script=script, vocab_size=byte_level.vocab_size, max_model_len=MAX_LEN, step_s=step_s
            )
            server = Server(byte_level, factory, Config(**settings))
            await server.engine.start()
            stack.push_async_callback(server.engine.stop)
            return server

        yield start


def chat(text: str = "Hi", *, timeout_s: float | None = None, **sampling: Any) -> ChatRequest:
    return ChatRequest("r1", (Message("user", text),), SamplingParams(**sampling), timeout_s=timeout_s)


def completion(*prompts: str | tuple[int, ...], echo: bool = False, **sampling: Any) -> CompletionRequest:
    return CompletionRequest("r2", prompts, SamplingParams(**sampling), echo=echo)


async def test_chat_renders_generates_and_ends(serve: Serve, byte_level: Tokenizer) -> None:
    answer = byte_level.encode("The capital of France is Paris 😀", add_special_tokens=False)
    server = await serve(Answer(answer))
    async with await server.service.chat(chat()) as events:
        collected = await collect(events)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    num_prompt = len(byte_level.encode(prompt, add_special_tokens=False))
    (choice,) = collected.choices
    assert choice.text == "The capital of France is Paris 😀"
    assert choice.reason is FinishReason.STOP
    assert events.prompt_tokens == collected.usage.prompt_tokens == num_prompt
    assert collected.usage.completion_tokens == len(answer) + 1


async def test_completion_continues_the_text(serve: Serve, byte_level: Tokenizer) -> None:
    server = await serve(Answer(byte_level.encode(" Paris", add_special_tokens=False)))
    async with await server.service.complete(completion("The capital is", echo=False)) as events:
        assert (await collect(events)).choices[0].text == " Paris"
    async with await server.service.complete(completion("The capital is", echo=True)) as events:
        assert (await collect(events)).choices[0].text == "The capital is Paris"
    token_ids = byte_level.encode("It is", add_special_tokens=False)
    async with await server.service.complete(completion(token_ids, echo=True)) as events:
        assert (await collect(events)).choices[0].text == "It is Paris"


async def test_random_tokens_give_the_text_of_all_at_once(serve: Serve, byte_level: Tokenizer) -> None:
    """No script: the runner's tokens are arbitrary, partial characters and special tokens among them."""
    server = await serve()
    request = completion("x", max_tokens=200, logprobs=0, ignore_eos=True, seed=5)
    async with await server.service.complete(request) as events:
        (choice,) = (await collect(events)).choices
    by_bytes = b"".join(info.bytes for info in choice.tokens if info.token not in byte_level.special_tokens.values())
    assert len(choice.tokens) == 200
    assert choice.text.replace("\ufffd", "") == by_bytes.replace(b"<|endoftext|>", b"").decode(errors="ignore")


async def test_choices_are_numbered_by_prompt_and_seeded_apart(serve: Serve) -> None:
    server = await serve()
    request = completion("a", "b", n=3, max_tokens=8, temperature=1.0, seed=11, ignore_eos=True)
    async with await server.service.complete(request) as events:
        collected = await collect(events)
    assert events.num_choices == len(collected.choices) == 6
    assert len({choice.text for choice in collected.choices}) == 6
    assert [choice.usage.prompt_tokens for choice in collected.choices] == [1, 0, 0, 1, 0, 0]
    async with await server.service.complete(request) as events:
        assert (await collect(events)).choices == collected.choices
    alone = completion("b", max_tokens=8, temperature=1.0, seed=11, ignore_eos=True)
    async with await server.service.complete(alone) as events:
        assert (await collect(events)).choices[0].text == collected.choices[3].text


async def test_stop_string_ends_text_and_sequence(serve: Serve, byte_level: Tokenizer) -> None:
    answer = byte_level.encode("one two three four ", add_special_tokens=False)
    server = await serve(Answer(answer, repeats=True))
    async with await server.service.chat(chat(stop=("three",), max_tokens=200)) as events:
        (choice,) = (await collect(events)).choices
        assert (choice.text, choice.reason, choice.stop_string) == ("one two ", FinishReason.STOP, "three")
    assert choice.usage.completion_tokens < len(answer)
    await server.idle()


async def test_end_token_is_ignored_on_request(serve: Serve, byte_level: Tokenizer) -> None:
    server = await serve(Answer(byte_level.encode("ab", add_special_tokens=False)))
    async with await server.service.chat(chat(ignore_eos=True, max_tokens=9)) as events:
        (choice,) = (await collect(events)).choices
    assert (choice.reason, choice.usage.completion_tokens) == (FinishReason.LENGTH, 9)


async def test_stop_token_of_the_request_is_not_shown(serve: Serve, byte_level: Tokenizer) -> None:
    answer = byte_level.encode("abc", add_special_tokens=False)
    server = await serve(Answer(answer))
    async with await server.service.chat(chat(stop_token_ids=answer[-1:])) as events:
        (choice,) = (await collect(events)).choices
    assert choice.text == byte_level.decode(answer[:-1])
    assert choice.usage.completion_tokens == len(answer)


async def test_output_fills_the_context_and_no_more(serve: Serve, byte_level: Tokenizer) -> None:
    server = await serve(Answer(byte_level.encode("a", add_special_tokens=False), repeats=True))
    async with await server.service.chat(chat()) as events:
        (choice,) = (await collect(events)).choices
    assert choice.usage.prompt_tokens + choice.usage.completion_tokens == MAX_LEN
    assert choice.reason is FinishReason.LENGTH


async def test_closing_aborts_every_choice(serve: Serve, byte_level: Tokenizer) -> None:
    server = await serve(Answer(byte_level.encode("a", add_special_tokens=False), repeats=True), step_s=0.002)
    events = await server.service.chat(chat(n=4))
    assert isinstance(await anext(events), TextDelta)
    await events.aclose()
    await events.aclose()
    assert [event async for event in events] == []
    await server.idle()


async def test_cancelled_reader_aborts_its_request(serve: Serve, byte_level: Tokenizer) -> None:
    server = await serve(Answer(byte_level.encode("a", add_special_tokens=False), repeats=True), step_s=0.002)
    begun = asyncio.Event()

    async def read() -> None:
        async with await server.service.chat(chat(n=2)) as events:
            async for _ in events:
                begun.set()

    reader = asyncio.create_task(read())
    await begun.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await server.idle()


async def test_timeout_ends_the_request(serve: Serve, byte_level: Tokenizer) -> None:
    server = await serve(Answer(byte_level.encode("a", add_special_tokens=False), repeats=True), step_s=0.01)
    async with await server.service.chat(chat(timeout_s=0.05)) as events:
        with pytest.raises(RequestTimeout, match=r"0\.05 s"):
            await collect(events)
        await server.idle()


async def test_full_queue_is_refused_before_the_first_event(serve: Serve, byte_level: Tokenizer) -> None:
    script = Answer(byte_level.encode("a", add_special_tokens=False), repeats=True)
    server = await serve(script, step_s=0.005, max_num_seqs=1, max_waiting=0)
    async with await server.service.chat(chat()) as first:
        assert await first.ready()
        second = await server.service.complete(completion("b"))
        with pytest.raises(ServerBusy):
            await second.ready(5.0)
        await second.aclose()
        assert isinstance(await anext(first), TextDelta)


async def test_long_input_leaves_the_event_loop_free(serve: Serve) -> None:
    server = await serve()
    prompt = "The quick brown fox. " * 100_000
    asking = asyncio.create_task(server.service.complete(completion(prompt)))
    num_turns = 0
    while not asking.done():
        await asyncio.sleep(0)
        num_turns += 1
    with pytest.raises(ContextLengthExceeded):
        await asking
    assert num_turns > 2


async def test_a_request_overrides_single_template_defaults(serve: Serve, byte_level: Tokenizer) -> None:
    defaults = {"mood": "x" * 50, "pace": "y" * 90}
    server = await serve(max_request_tokens=40000, default_chat_template_kwargs=defaults)
    server.service._encoder._template = ChatTemplate("{{ mood }}{{ pace }}", special_tokens={})
    request = ChatRequest("r", (Message("user", "Hi"),), SamplingParams(max_tokens=1), template_kwargs={"mood": "z"})
    expected = byte_level.encode("z" + defaults["pace"], add_special_tokens=False)
    async with await server.service.chat(request) as events:
        assert events.prompt_tokens == len(expected)


@pytest.mark.parametrize(
    ("sampling", "error", "param"),
    [
        ({"max_tokens": MAX_LEN}, ContextLengthExceeded, "messages"),
        ({"max_tokens": 40_000}, OutputLimitExceeded, "max_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, InvalidRequest, "min_tokens"),
        ({"logit_bias": {100_000: 1.0}}, InvalidRequest, "logit_bias.100000"),
        ({"stop_token_ids": (-1,)}, InvalidRequest, "stop_token_ids"),
        ({"n": 9}, InvalidRequest, "n"),
    ],
)
async def test_bad_sampling_is_refused(
    serve: Serve, sampling: dict[str, Any], error: type[InvalidRequest], param: str
) -> None:
    server = await serve(max_num_seqs=4, max_waiting=4)
    with pytest.raises(error) as caught:
        await server.service.chat(chat(**sampling))
    assert type(caught.value) is error
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("request_", "error", "param"),
    [
        (completion("a b " * MAX_LEN), ContextLengthExceeded, "prompt"),
        (completion((1, 100_000)), InvalidRequest, "prompt"),
        (completion(""), InvalidRequest, "prompt"),
        (completion(()), InvalidRequest, "prompt"),
        (completion(), InvalidRequest, "prompt"),
        (completion("\udc80"), InvalidRequest, "prompt"),
        (msgspec.structs.replace(completion("a"), suffix="b"), InvalidRequest, "suffix"),
    ],
)
async def test_bad_prompt_is_refused(
    serve: Serve, request_: CompletionRequest, error: type[InvalidRequest], param: str
) -> None:
    server = await serve()
    with pytest.raises(error) as caught:
        await server.service.complete(request_)
    assert type(caught.value) is error
    assert caught.value.param == param


async def test_model_without_template_names_the_remedy(sentencepiece: Tokenizer) -> None:
    config = Config()
    engine = ThreadEngine(fake_factory(), config)
    await engine.start()
    try:
        with pytest.raises(InvalidRequest, match=r"/v1/completions.*chat_template\.jinja"):
            await ChatService(engine, sentencepiece, config=config).chat(chat())
    finally:
        await engine.stop()


async def test_engine_that_is_not_there(byte_level: Tokenizer) -> None:
    config = Config()
    engine = ThreadEngine(fake_factory(), config)
    service = ChatService(engine, byte_level, config=config)
    with pytest.raises(ServerBusy, match="loading"):
        await service.chat(chat())
    await engine.start()
    assert service.max_model_len == 4096
    await engine.stop()
    assert engine.status().state is EngineState.STOPPED
    with pytest.raises(EngineFailure) as caught:
        await service.chat(chat())
    assert caught.value.status == 503


async def test_stopped_engine_ends_open_requests_with_an_error(serve: Serve, byte_level: Tokenizer) -> None:
    server = await serve(Answer(byte_level.encode("a", add_special_tokens=False), repeats=True), step_s=0.005)
    async with await server.service.chat(chat(n=2)) as events:
        await events.ready()
        await server.engine.stop()
        with pytest.raises(EngineFailure) as caught:
            await collect(events)
        assert caught.value.status == 503


def test_operators_defaults_come_before_the_models(byte_level: Tokenizer) -> None:
    config = Config(default_temperature=0.3, default_top_k=5)
    service = ChatService(ThreadEngine(fake_factory(), config), byte_level, config=config)
    assert service.sampling_defaults == {"temperature": 0.3, "top_k": 5}


SYSTEM_TEXT = "The quick brown fox jumps over the lazy dog. " * 4


def conversation(system: str, text: str = "Hi", *, tenant: bytes = b"", request_id: str = "r1") -> ChatRequest:
    messages = (Message("system", system), Message("user", text))
    sampling = SamplingParams(max_tokens=2, temperature=0)
    return ChatRequest(request_id, messages, sampling, tenant=tenant, wants_cache_report=True)


async def answered(server: Server, request: ChatRequest, *, warm: bool = False) -> tuple[int, str]:
    """Tokens found, and why no more."""
    async with await (server.service.warm(request) if warm else server.service.chat(request)) as events:
        await collect(events)
        [explanation] = events.explanations()
        assert events.num_cached == explanation.num_found
        return explanation.num_found, explanation.reason.value


async def test_second_request_says_that_it_hit(serve: Serve) -> None:
    server = await serve(Answer((5, 6, 7)))
    assert await answered(server, conversation(SYSTEM_TEXT)) == (0, "never_seen")
    match, _ = await server.service.explain(conversation(SYSTEM_TEXT))
    assert await answered(server, conversation(SYSTEM_TEXT)) == (match.num_tokens - 1, "hit")


async def test_tenants_find_nothing_of_each_other(serve: Serve) -> None:
    server = await serve(Answer((5, 6, 7)))
    await answered(server, conversation(SYSTEM_TEXT, tenant=b"one"))
    assert await answered(server, conversation(SYSTEM_TEXT, tenant=b"two")) == (0, "never_seen")
    assert await answered(server, conversation(SYSTEM_TEXT)) == (0, "never_seen")
    assert (await answered(server, conversation(SYSTEM_TEXT, tenant=b"one")))[1] == "hit"


async def test_explaining_computes_nothing_and_agrees_with_the_request_that_follows(serve: Serve) -> None:
    server = await serve(Answer((5, 6, 7)))
    await answered(server, conversation(SYSTEM_TEXT, "Hi"))
    before = server.engine.status().stats.num_tokens
    asked = conversation(SYSTEM_TEXT, "Something else")
    match, explanation = await server.service.explain(asked)
    assert explanation.reason.value == "different_messages"
    assert explanation.difference is not None
    assert explanation.difference.given.startswith("Something else")
    assert server.engine.status().stats.num_tokens == before
    assert await answered(server, asked) == (match.num_found, "different_messages")


async def test_priority_reaches_the_engine(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await serve(Answer((5, 6, 7)))
    seen, generate = [], server.engine.generate
    monkeypatch.setattr(server.engine, "generate", lambda submit: seen.append(submit.priority) or generate(submit))
    await answered(server, msgspec.structs.replace(conversation(SYSTEM_TEXT), priority=-3))
    assert seen == [-3]


async def test_billing_line_does_not_spoil_the_prefix_unless_it_is_kept(serve: Serve) -> None:
    texts = [f"x-anthropic-billing-header: cch={nonce};\n{SYSTEM_TEXT}" for nonce in ("00a1f", "9d3e0")]
    server = await serve(Answer((5, 6, 7)))
    assert [(await answered(server, conversation(text)))[1] for text in texts] == ["never_seen", "hit"]
    server = await serve(Answer((5, 6, 7)), stable_prompts=False)
    assert [(await answered(server, conversation(text)))[1] for text in texts] == ["never_seen", "volatile_field"]


async def test_warm_prompt_is_the_beginning_of_what_follows(serve: Serve) -> None:
    server = await serve(Answer((5, 6, 7)))
    request = ChatRequest("w", (Message("system", SYSTEM_TEXT),), SamplingParams(max_tokens=1))
    async with await server.service.warm(request) as events:
        num_warm = (await collect(events)).usage.prompt_tokens
    found, reason = await answered(server, conversation(SYSTEM_TEXT))
    assert (found, reason) == (num_warm, "hit")
