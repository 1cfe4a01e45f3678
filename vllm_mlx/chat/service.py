"""Requests to event streams: the only place that joins templates, tokenizer and engine."""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from vllm_mlx.chat.choice import ChoiceDecoder, Reading
from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.encode import Encoded, PromptEncoder, callable_tools, shown_tools
from vllm_mlx.chat.enforce import Enforcer
from vllm_mlx.chat.explain import Explainer, Explanation
from vllm_mlx.chat.formats import with_elements
from vllm_mlx.chat.limits import bad_word_ids, check_sampling, check_token_ids, choice_seeds, max_output_tokens
from vllm_mlx.chat.output_formats import OutputFormats, output_formats
from vllm_mlx.chat.parse import OutputParser
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.plain_tools import parameters_of
from vllm_mlx.chat.seen import Nearest, SeenPrompts
from vllm_mlx.chat.stream import EventStream, Explain
from vllm_mlx.chat.thinking import ThinkingLimit, closing_text
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.chat import ChatRequest, CompletionRequest, Message
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import EngineFailure, InvalidRequest, ServerBusy
from vllm_mlx.core.messages import CacheMatch, EngineClient, EngineState, Submit
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import RunnerInfo

__all__ = ["ChatService", "EventStream"]

_LONG_TEXT = 20_000
"""Characters from which rendering and encoding leave the event loop; this many take about five milliseconds."""

_MESSAGE_SIZE = 100
"""A message takes as long as so many characters, whatever is in it."""

_Result = TypeVar("_Result")


class Rendered(msgspec.Struct, frozen=True):
    """What the model would see of a conversation, and how its output would be read."""

    text: str
    token_ids: tuple[int, ...]
    tail: str
    """What the template wrote behind the last message."""
    begins_in_reasoning: bool
    chat_template: str | None
    tools_shown_as: str | None
    """'template' or 'text'; None if the request shows none."""
    tool_format: str | None
    """Its name; None if no calls are looked for."""
    reasoning_format: str | None
    sampling: SamplingParams


class ChatService:
    """Answers requests with one engine. Every method runs on the event loop that runs the engine client."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, *, config: Config) -> None:
        """Raises ModelError if the model's chat template is not valid, ConfigError if a parser is not known."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._config = config
        self._last_info: RunnerInfo | None = None
        self._encoder = PromptEncoder(tokenizer, config=config)
        self.formats: OutputFormats = output_formats(
            tokenizer, config=config, renders_tools=self._encoder.renders_tools
        )
        """How the model's output is read."""
        closing = closing_text(self.formats.reasoning) if self.formats.reasoning else None
        self._closing_ids = tuple(tokenizer.encode(closing, add_special_tokens=False)) if closing else ()
        self._enforcer = Enforcer(Constrainer(tokenizer), self.formats)
        self._seen = SeenPrompts()
        self._explainer = Explainer(tokenizer, is_enabled=config.prefix_cache)

    def over(self, engine: EngineClient, *, config: Config) -> ChatService:
        """The same model through another client and other settings; what was seen of prompts is shared."""
        other = copy.copy(self)
        other._engine, other._config = engine, config
        return other

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of `SamplingParams` for requests that do not give them: the operator's over the model's."""
        return {**self._tokenizer.generation_defaults, **self._config.sampling_defaults}

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together.

        Raises:
            ServerBusy: the model is still loading.
            EngineFailure: there is no engine.
        """
        return self._info().max_model_len

    async def chat(self, request: ChatRequest) -> EventStream:
        """Continue a conversation.

        Raises:
            InvalidRequest: the request cannot be served as it is; `param` names the field.
            ServerBusy: the model is still loading.
            EngineFailure: there is no engine.
        """
        info = self._info()
        encoded = await self._encode_chat(request, info)
        sampling = await self._enforcer.chat(request, vocab_size=info.vocab_size, tail=encoded.tail)
        request = msgspec.structs.replace(request, sampling=sampling)
        return self._start(request, [encoded], info, param="messages")

    async def warm(self, request: ChatRequest) -> EventStream:
        """Compute a conversation and pin what is remembered of it; raises as `chat` does.

        It is rendered without the beginning of an answer, so that it is the beginning of whatever follows.
        """
        info = self._info()
        encoded = await self._encode_chat(request, info, add_generation_prompt=False)
        return self._start(request, [encoded], info, param="messages", pinned=True)

    async def explain(self, request: ChatRequest) -> tuple[CacheMatch, Explanation]:
        """What is remembered of a conversation, and why not more; computes nothing. Raises as `chat` does."""
        info = self._info()
        encoded = await self._encode_chat(request, info)
        match = await self._engine.lookup(encoded.prompt)
        [explanation] = self._explain_later([encoded], info)([match.num_found])
        return match, explanation

    async def count_tokens(self, request: ChatRequest) -> int:
        """Tokens of a conversation's prompt; computes nothing. Raises as `chat` does."""
        return len((await self._encode_chat(request, self._info())).prompt)

    async def render(self, request: ChatRequest) -> Rendered:
        """What a conversation becomes; computes nothing. Raises as `chat` does."""
        info = self._info()
        one = await self._encode_chat(request, info)
        sampling = await self._enforcer.chat(request, vocab_size=info.vocab_size, tail=one.tail)
        shown, formats = shown_tools(request), self.formats
        return Rendered(
            text=one.text,
            token_ids=one.prompt.token_ids,
            tail=one.tail,
            begins_in_reasoning=formats.reasoning is not None and formats.reasoning.leaves_open(one.tail),
            chat_template=self._tokenizer.chat_template,
            tools_shown_as=("template" if self._encoder.renders_tools else "text") if shown else None,
            tool_format=formats.tools.name if shown and formats.tools else None,
            reasoning_format=formats.reasoning.name if formats.reasoning else None,
            sampling=sampling,
        )

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a raw text."""
        encode = functools.partial(self._tokenizer.encode, add_special_tokens=add_special_tokens)
        return await _run(encode, text, size=len(text))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included. Raises InvalidRequest for ids outside the vocabulary."""
        check_token_ids(token_ids, vocab_size=self._info().vocab_size, param="tokens")
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """The text of one token."""
        return self._tokenizer.token_text(token_id)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Role to text, such as 'eos_token' to '</s>'."""
        return self._tokenizer.special_tokens

    @property
    def chat_template(self) -> str | None:
        """Source of the model's Jinja template; None for a base model."""
        return self._tokenizer.chat_template

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self.chat_template is not None

    async def complete(self, request: CompletionRequest) -> EventStream:
        """Continue raw text or token ids; raises as `chat` does."""
        info = self._info()
        if not request.prompts:
            raise InvalidRequest("There must be at least one prompt.", param="prompt")
        size = sum(len(prompt) for prompt in request.prompts) + len(request.suffix or "")
        inputs = await _run(self._encoder.completion, request, info, size=size)
        sampling = await self._enforcer.completion(request, vocab_size=info.vocab_size)
        request = msgspec.structs.replace(request, sampling=sampling)
        return self._start(request, inputs, info, param="prompt")

    async def _encode_chat(
        self, request: ChatRequest, info: RunnerInfo, *, add_generation_prompt: bool = True
    ) -> Encoded:
        encode = functools.partial(
            self._encoder.chat,
            add_generation_prompt=add_generation_prompt,
            wants_tail=self.formats.reasoning is not None,
        )
        size = sum(_size(message) for message in request.messages)
        return await _run(encode, request, info, size=size + len(msgspec.json.encode(request.tools)))

    def _info(self) -> RunnerInfo:
        """Facts about the model, also while its engine is being restarted: generation waits for it by itself."""
        status = self._engine.status()
        if status.state in (EngineState.FAILED, EngineState.STOPPED):
            raise EngineFailure(f"The engine is not running: {status.reason or status.state}.", status=503)
        self._last_info = status.info or self._last_info
        if status.state is EngineState.STARTING or self._last_info is None:
            raise ServerBusy("The model is loading; try again in a moment.", retry_after_s=5)
        return self._last_info

    def _start(
        self,
        request: ChatRequest | CompletionRequest,
        inputs: Sequence[Encoded],
        info: RunnerInfo,
        *,
        param: str,
        pinned: bool = False,
    ) -> EventStream:
        """Check everything that is left, then submit all choices of all prompts."""
        sampling = request.sampling
        check_sampling(sampling, vocab_size=info.vocab_size, config=self._config)
        max_choices = self._config.max_num_seqs + self._config.max_waiting
        if len(inputs) * sampling.n > max_choices:
            raise InvalidRequest(f"At most {max_choices} choices can be asked for at once.", param="n")
        may_be_shorter = isinstance(request, ChatRequest) and request.output_may_be_shorter
        resolved = [
            self._engine_sampling(sampling, one, info, param=param, may_be_shorter=may_be_shorter) for one in inputs
        ]
        explain = self._explain_later(inputs, info) if request.wants_cache_report else None
        choices: list[tuple[Submit, ChoiceDecoder]] = []
        for one, engine_sampling in zip(inputs, resolved, strict=True):
            self._remember(f"{request.request_id}-{len(choices)}", one)
            for index, seed in enumerate(choice_seeds(sampling.seed, sampling.n)):
                choice = len(choices)
                submit = Submit(
                    f"{request.request_id}-{choice}",
                    one.prompt,
                    engine_sampling.replace(seed=seed),
                    priority=request.priority,
                    pinned=pinned,
                    breakpoints=one.breakpoints,
                    keeps=one.marks,
                )
                decoder = self._decoder(request, one, submit.sampling, choice=choice, is_first=index == 0)
                choices.append((submit, decoder))
        return EventStream(
            self._engine,
            choices,
            prompt_tokens=sum(len(one.prompt) for one in inputs),
            # A warm prompt may take as long as it needs.
            timeout_s=request.timeout_s or (None if pinned else self._config.timeout) or None,
            on_tokens=None if pinned else self._seen.extend,  # nobody goes on from a warm prompt's token
            explain=explain,
            marks=inputs[0].marks,
        )

    def _remember(self, name: str, one: Encoded) -> None:
        """Keep a prompt for later explanations, under the id of the sequence whose answer belongs to it."""
        if self._config.prefix_cache:
            self._seen.add(name, one.prompt.token_ids, one.outline)

    def _nearest(self, one: Encoded, info: RunnerInfo) -> Nearest | None:
        return self._seen.nearest(one.prompt.token_ids, one.outline, page_size=info.cache.page_size)

    def _explain_later(self, inputs: Sequence[Encoded], info: RunnerInfo) -> Explain:
        """Compare with earlier prompts now, before these are among them; say why when it is known what was found."""
        before = [(one, self._nearest(one, info)) for one in inputs]

        def explain(num_found: Sequence[int]) -> tuple[Explanation, ...]:
            return tuple(
                self._explainer.explain(len(one.prompt), found, outline=one.outline, nearest=nearest, cache=info.cache)
                for (one, nearest), found in zip(before, num_found, strict=True)
            )

        return explain

    def _decoder(
        self,
        request: ChatRequest | CompletionRequest,
        one: Encoded,
        engine_sampling: SamplingParams,
        *,
        choice: int,
        is_first: bool,
    ) -> ChoiceDecoder:
        reading = None
        if isinstance(request, ChatRequest):
            reading = self._reading(request, one, choice=choice, max_output=engine_sampling.max_tokens)
        decoder = ChoiceDecoder(
            self._tokenizer,
            choice=choice,
            prompt_ids=one.prompt.token_ids,
            sampling=request.sampling,
            stream_interval=self._config.stream_interval,
            echo=one.echo,
            counts_prompt=is_first,
            reading=reading,
            tells_token_ids=isinstance(request, ChatRequest) and request.wants_token_ids,
            is_prompt_only=isinstance(request, CompletionRequest) and request.is_prompt_only,
            reports_end=isinstance(request, CompletionRequest) and request.reports_end,
        )
        if reading and reading.limit and reading.limit.is_spent and reading.parser.begins_thinking:
            decoder.close_reasoning()
        return decoder

    def _reading(self, request: ChatRequest, one: Encoded, *, choice: int, max_output: int | None) -> Reading | None:
        """How a choice's text is read; None if all of it is the answer."""
        tools = callable_tools(request)
        formats = self.formats
        if formats.reasoning is None and (formats.tools is None or not tools):
            return None
        plain = frozenset(tool.name for tool in tools if tool.syntax is not None)
        parser = OutputParser(
            choice=choice,
            tools=ToolSet({tool.name: parameters_of(tool) for tool in tools}, plain) if tools else None,
            tool_format=with_elements(formats.tools) if formats.tools and plain else formats.tools,
            reasoning=formats.reasoning,
            prompt_tail=one.tail,
            salt=request.request_id,
        )
        return Reading(
            parser,
            formats,
            max_calls=None if request.parallel_tool_calls else 1,
            is_shaped=request.output is not None,
            limit=self._thinking_limit(request, max_output),
        )

    def _thinking_limit(self, request: ChatRequest, max_output: int | None) -> ThinkingLimit | None:
        """When a choice's reasoning ends by force; None for a model whose reasoning has no mark for its end."""
        config, budget = self._config, request.thinking_budget
        budget = config.default_thinking_token_budget if budget is None else budget
        if not self._closing_ids or (budget is None and not config.break_thinking_loops):
            return None
        return ThinkingLimit(
            budget, closing_ids=self._closing_ids, max_output=max_output, breaks_cycles=config.break_thinking_loops
        )

    def _engine_sampling(
        self, sampling: SamplingParams, one: Encoded, info: RunnerInfo, *, param: str, may_be_shorter: bool
    ) -> SamplingParams:
        """What a sequence of the engine gets, but for its seed: a single choice, everything resolved, no text."""
        token_ids = one.prompt.token_ids
        max_tokens = max_output_tokens(
            sampling,
            num_prompt=len(token_ids),
            max_model_len=info.max_model_len,
            default=self._config.max_tokens,
            param=param,
            may_be_shorter=may_be_shorter,
        )
        eos = () if sampling.ignore_eos else sorted({*self._tokenizer.eos_token_ids, *one.stop_token_ids})
        stop_token_ids = dict.fromkeys((*sampling.stop_token_ids, *(i for i in eos if 0 <= i < info.vocab_size)))
        bad_words = bad_word_ids(sampling.bad_words, self._tokenizer)
        own = sampling.replace(n=1, stop=(), bad_words=(), bad_word_ids=(*sampling.bad_word_ids, *bad_words))
        return own.replace(max_tokens=max_tokens, stop_token_ids=tuple(stop_token_ids))


def _size(message: Message) -> int:
    """Characters of a message's content, and what the message itself costs."""
    content = message.content or ""
    texts = [content] if isinstance(content, str) else [part.text for part in content]
    return _MESSAGE_SIZE + sum(map(len, texts)) + sum(len(call.arguments) for call in message.tool_calls)


async def _run(function: Callable[..., _Result], *args: object, size: int) -> _Result:
    """Call `function` here if there is little to do, on a thread if `size` characters would hold up the event loop."""
    if size < _LONG_TEXT:
        return function(*args)
    return await asyncio.to_thread(function, *args)
