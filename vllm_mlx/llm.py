"""A model in a script, without HTTP: the same engine, templates and parsing as the server."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import uuid
import weakref
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar

import msgspec
from pydantic import Field

from vllm_mlx.api.wire.base import WireModel
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.api.wire.messages import WireMessage, to_message
from vllm_mlx.api.wire.tools import WireTools, to_tools
from vllm_mlx.chat.collect import Collected, collect
from vllm_mlx.chat.service import ChatService
from vllm_mlx.chat.stream import EventStream
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.cli.compose import open_engine
from vllm_mlx.cli.display import Display
from vllm_mlx.cli.settings import did_you_mean, make_config, settings
from vllm_mlx.core.chat import ChatRequest, CompletionRequest, ToolCall
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError, InvalidRequest
from vllm_mlx.core.events import Finish, ReasoningDelta, TextDelta, TokenInfo, ToolCallDelta, Usage
from vllm_mlx.core.messages import EngineClient, FinishReason
from vllm_mlx.core.sampling import SamplingParams, merge
from vllm_mlx.core.step import ProgressCallback, RunnerInfo
from vllm_mlx.models.resolve import resolve

Prompt = str | Sequence[int]
"""Text, or token ids."""
Messages = Sequence[Mapping[str, Any]]
"""A conversation, as objects of the OpenAI API: `{"role": "user", "content": "Hello"}`."""
Tools = Sequence[Mapping[str, Any]]
"""Tools, as objects of the OpenAI API: `{"type": "function", "function": {"name": ...}}`."""
Sampling = SamplingParams | Sequence[SamplingParams] | None
"""One for all prompts, one each, or None for the model's own defaults."""
_Result = TypeVar("_Result")
_Request = ChatRequest | CompletionRequest


class CompletionOutput(msgspec.Struct, frozen=True):
    """One finished choice."""

    index: int
    text: str
    finish_reason: FinishReason
    stop_string: str | None = None
    """The one of `SamplingParams.stop` that ended it."""
    tokens: tuple[TokenInfo, ...] = ()
    """With log-probabilities; empty unless `SamplingParams.logprobs` is set."""
    reasoning: str = ""
    """What the model thought before it answered; not part of `text`."""
    tool_calls: tuple[ToolCall, ...] = ()


class RequestOutput(msgspec.Struct, frozen=True):
    """All choices for one prompt or conversation."""

    prompt: Any
    """As given."""
    outputs: tuple[CompletionOutput, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.outputs[0].text


class Chunk(msgspec.Struct, frozen=True):
    """A piece of a running answer. The last one of each choice has a `finish_reason` and the choice's `usage`."""

    text: str
    index: int = 0
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    reasoning: str = ""
    """More of what the model thinks before it answers."""
    tool_call: ToolCallDelta | None = None
    """More of a call."""


class LLM:
    """A loaded model. Blocking calls, usable from any thread; a context manager that gives the memory back.

    `settings` are the fields of `Config` (docs/reference/settings.md); here requests have no timeout and the engine
    logs warnings only, unless they say otherwise. `engine="thread"` runs the model in this process.

    Raises:
        ConfigError: a setting is unknown or wrong.
        ModelError: the model is unknown, broken or not supported.
        EngineStartError: the engine could not start.
    """

    def __init__(self, model: str = "demo", *, show_progress: bool | None = None, **settings: Any) -> None:
        """`show_progress` draws bars on standard error; None does so on a terminal."""
        config = _config(model, settings)
        if sys.stderr.isatty() if show_progress is None else show_progress:
            with Display() as display:
                self._open(config, display)
        else:
            self._open(config, _be_quiet)

    @classmethod
    def from_config(cls, config: Config, *, progress: ProgressCallback) -> Self:
        """The same from a complete record; `progress` is called from other threads."""
        llm = cls.__new__(cls)
        llm._open(config, progress)
        return llm

    @property
    def info(self) -> RunnerInfo:
        """Facts about the loaded model."""
        return self._info

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling: Sampling = None) -> list[RequestOutput]:
        """Continue texts or token ids, all in one batch; the outputs are in the order of the prompts.

        Raises:
            InvalidRequest: a prompt or a parameter cannot be served; nothing of the batch is returned.
            EngineFailure: the engine failed.
        """
        given: list[Any] = [prompts] if _is_prompt(prompts) else list(prompts)
        each = self._sampling(sampling, len(given))
        return self._run(given, [_completion(prompt, one) for prompt, one in zip(given, each, strict=True)])

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        tools: Tools = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several in one batch; always a list, in order. Raises as `generate` does."""
        given = [messages] if _is_conversation(messages) else list(messages)
        each = self._sampling(sampling, len(given))
        requests = [_chat(one, how, tools, chat_template_kwargs) for one, how in zip(given, each, strict=True)]
        return self._run(given, requests)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling: SamplingParams | None = None,
        *,
        tools: Tools = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Chunk]:
        """Continue a text or a conversation piece by piece. Closing the iterator stops the work on it."""
        [how] = self._sampling(sampling, 1)
        given: Any = prompt
        request = _completion(given, how) if _is_prompt(given) else _chat(given, how, tools, chat_template_kwargs)
        events = self._call(_start(self._service, request))
        try:
            while (chunk := self._call(_next_chunk(events))) is not None:
                yield chunk
        finally:
            # Python may end a forgotten iterator after `close`, which has stopped the work already.
            if not self._loop.is_closed:
                self._call(events.aclose())

    def close(self) -> None:
        """End the engine and free its memory. May be called twice; nothing else may be called afterwards."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, config: Config, progress: ProgressCallback) -> None:
        self._config = config
        files = resolve(config, progress=progress)
        self._tokenizer = Tokenizer.load(files.path, trust_remote_code=config.trust_remote_code)
        self._loop = _LoopThread()
        self._finalizer = weakref.finalize(self, self._loop.close)
        try:
            self._info = self._call(self._start_engine(files.path, progress))
        finally:
            if not hasattr(self, "_info"):
                self.close()

    async def _start_engine(self, path: Any, progress: ProgressCallback) -> RunnerInfo:
        engine = open_engine(self._config, path, on_progress=progress)
        self._loop.adopt(engine)
        self._service = ChatService(engine, self._tokenizer, config=self._config)
        return await engine.start()

    def _call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return self._loop.call(work)

    def _sampling(self, given: Sampling, count: int) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            given = [merge({}, self._service.sampling_defaults) if given is None else given] * count
        if len(given) != count:
            raise InvalidRequest(f"There are {count} prompts but {len(given)} sampling parameters.", param="sampling")
        return [_with_tuples(one) for one in given]

    def _run(self, given: Sequence[Any], requests: Sequence[_Request]) -> list[RequestOutput]:
        answers = self._call(_answer_all(self._service, requests, self._config.max_num_seqs))
        return [_output(prompt, answer) for prompt, answer in zip(given, answers, strict=True)]


class _LoopThread:
    """An event loop on a thread of its own, with the engine client that lives on it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._engine: EngineClient | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """After `close`: nothing can be called."""
        return self._loop.is_closed()

    def adopt(self, engine: EngineClient) -> None:
        """Stop this engine in `close`."""
        self._engine = engine

    def call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run on the loop and wait; an interrupted wait cancels the work."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("This LLM is closed.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        if self._engine is not None:
            self.call(self._engine.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Conversation(WireModel):
    """A conversation as the API takes it."""

    messages: Annotated[list[WireMessage], Field(min_length=1)]
    """Messages in order."""
    tools: WireTools
    """Functions that the model may call."""


async def _start(service: ChatService, request: _Request) -> EventStream:
    return await (service.chat(request) if isinstance(request, ChatRequest) else service.complete(request))


async def _next_chunk(events: EventStream) -> Chunk | None:
    """The next piece; None at the end."""
    async for event in events:
        match event:
            case TextDelta():
                return Chunk(event.text, event.choice, event.tokens)
            case ReasoningDelta():
                return Chunk("", event.choice, event.tokens, reasoning=event.text)
            case ToolCallDelta():
                return Chunk("", event.choice, tool_call=event)
            case Finish():
                return Chunk("", event.choice, finish_reason=event.reason, usage=event.usage)
    return None


async def _answer_all(service: ChatService, requests: Sequence[_Request], most_at_once: int) -> list[Collected]:
    """Every answer, or the first error. No more requests are open at a time than the engine runs together."""
    slots = asyncio.Semaphore(most_at_once)

    async def answer(request: _Request) -> Collected:
        async with slots, await _start(service, request) as events:
            return await collect(events)

    tasks = [asyncio.create_task(answer(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _config(model: str, given: dict[str, Any]) -> Config:
    known = [setting.name for setting in settings()]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"unknown setting {unknown}{did_you_mean(unknown, known)}")
    return make_config({"timeout": 0.0, "log_level": "warning", **given, "model": model}, {})


def _completion(prompt: Prompt, sampling: SamplingParams) -> CompletionRequest:
    one = prompt if isinstance(prompt, str) else tuple(prompt)
    return CompletionRequest(request_id=uuid.uuid4().hex, prompts=(one,), sampling=sampling)


def _chat(
    messages: Any, sampling: SamplingParams, tools: Tools, template_kwargs: Mapping[str, Any] | None
) -> ChatRequest:
    body = decode(json.dumps({"messages": list(messages), "tools": list(tools)}).encode(), _Conversation)
    return ChatRequest(
        request_id=uuid.uuid4().hex,
        messages=tuple(to_message(wire, position=i) for i, wire in enumerate(body.messages)),
        sampling=sampling,
        tools=to_tools(body.tools),
        template_kwargs=dict(template_kwargs or {}),
    )


def _output(prompt: Any, answer: Collected) -> RequestOutput:
    outputs = tuple(
        CompletionOutput(
            index,
            choice.text,
            choice.reason,
            choice.stop_string,
            choice.tokens,
            choice.reasoning,
            choice.tool_calls,
        )
        for index, choice in enumerate(answer.choices)
    )
    return RequestOutput(prompt, outputs, answer.usage)


def _with_tuples(sampling: SamplingParams) -> SamplingParams:
    """A single stop string or a list is what people write; inside it is always a tuple."""
    given: Any = sampling.stop
    stop = (given,) if isinstance(given, str) else tuple(given)
    return sampling.replace(stop=stop, stop_token_ids=tuple(sampling.stop_token_ids))


def _is_prompt(given: Any) -> bool:
    """Whether it is one prompt: text, or a non-empty sequence of token ids."""
    return isinstance(given, str) or (len(given) > 0 and all(isinstance(token, int) for token in given))


def _is_conversation(given: Any) -> bool:
    """Whether it is one conversation, not several."""
    return len(given) > 0 and isinstance(given[0], Mapping)


def _be_quiet(text: str, fraction: float | None = None) -> None:
    """Progress that nobody watches."""
