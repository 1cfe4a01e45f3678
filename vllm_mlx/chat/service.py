"""Requests to event streams: the only place that joins templates, tokenizer and engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from vllm_mlx.chat.choice import ChoiceDecoder
from vllm_mlx.chat.limits import check_sampling, check_text, check_token_ids, choice_seeds, max_output_tokens
from vllm_mlx.chat.render import ChatTemplate
from vllm_mlx.chat.stream import EventStream
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.chat import ChatRequest, CompletionRequest, Message
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import EngineFailure, InvalidRequest, ServerBusy
from vllm_mlx.core.messages import EngineClient, EngineState, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import RunnerInfo

__all__ = ["ChatService", "EventStream"]

_LONG_TEXT = 20_000
"""Characters from which rendering and encoding leave the event loop; this many take about five milliseconds."""

_Result = TypeVar("_Result")


class _Input(NamedTuple):
    """One prompt: its tokens, and the text that its choices begin with."""

    token_ids: tuple[int, ...]
    echo: str = ""


class ChatService:
    """Answers requests with one engine. Every method runs on the event loop that runs the engine client."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, *, config: Config) -> None:
        """Raises ModelError if the model's chat template is not valid."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._config = config
        self._last_info: RunnerInfo | None = None
        source = tokenizer.chat_template
        self._template = ChatTemplate(source, special_tokens=tokenizer.special_tokens) if source is not None else None

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
        size = sum(_size(message) for message in request.messages)
        token_ids = await _run(self._encode_chat, request, info.max_model_len, size=size)
        return self._start(request, [_Input(token_ids)], info, param="messages")

    async def complete(self, request: CompletionRequest) -> EventStream:
        """Continue raw text or token ids; raises as `chat` does."""
        info = self._info()
        if not request.prompts:
            raise InvalidRequest("There must be at least one prompt.", param="prompt")
        if request.echo and request.sampling.logprobs is not None:
            raise InvalidRequest("echo cannot be combined with logprobs: prompts have none.", param="echo")
        size = sum(len(prompt) for prompt in request.prompts)
        inputs = await _run(self._encode_prompts, request, info, size=size)
        return self._start(request, inputs, info, param="prompt")

    def _info(self) -> RunnerInfo:
        """Facts about the model, also while its engine is being restarted: generation waits for it by itself."""
        status = self._engine.status()
        if status.state in (EngineState.FAILED, EngineState.STOPPED):
            raise EngineFailure(f"The engine is not running: {status.reason or status.state}.", status=503)
        self._last_info = status.info or self._last_info
        if status.state is EngineState.STARTING or self._last_info is None:
            raise ServerBusy("The model is loading; try again in a moment.", retry_after_s=5)
        return self._last_info

    def _encode_chat(self, request: ChatRequest, max_model_len: int) -> tuple[int, ...]:
        """Render and encode; the template writes the special tokens itself."""
        if self._template is None:
            raise InvalidRequest(
                "This model has no chat template. Use /v1/completions, or put a chat_template.jinja into its folder.",
                param="messages",
            )
        kwargs = {**(self._config.default_chat_template_kwargs or {}), **request.template_kwargs}
        text = self._template.render(request.messages, kwargs)
        check_text(text, self._tokenizer, max_model_len=max_model_len, param="messages")
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _encode_prompts(self, request: CompletionRequest, info: RunnerInfo) -> list[_Input]:
        inputs = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                check_text(prompt, self._tokenizer, max_model_len=info.max_model_len, param="prompt")
                token_ids, text = self._tokenizer.encode(prompt, add_special_tokens=True), prompt
            else:
                token_ids, text = prompt, self._tokenizer.decode(prompt) if request.echo else ""
            inputs.append(_Input(token_ids, text if request.echo else ""))
        return inputs

    def _start(
        self, request: ChatRequest | CompletionRequest, inputs: Sequence[_Input], info: RunnerInfo, *, param: str
    ) -> EventStream:
        """Check everything that is left, then submit all choices of all prompts."""
        sampling = request.sampling
        check_sampling(sampling, vocab_size=info.vocab_size, config=self._config)
        max_choices = self._config.max_num_seqs + self._config.max_waiting
        if len(inputs) * sampling.n > max_choices:
            raise InvalidRequest(f"At most {max_choices} choices can be asked for at once.", param="n")
        resolved = [self._engine_sampling(sampling, one.token_ids, info, param=param) for one in inputs]
        choices: list[tuple[Submit, ChoiceDecoder]] = []
        for one, engine_sampling in zip(inputs, resolved, strict=True):
            for index, seed in enumerate(choice_seeds(sampling.seed, sampling.n)):
                choice = len(choices)
                prompt, seeded = Prompt(one.token_ids), engine_sampling.replace(seed=seed)
                decoder = self._decoder(one, sampling, choice=choice, is_first=index == 0)
                choices.append((Submit(f"{request.request_id}-{choice}", prompt, seeded), decoder))
        return EventStream(
            self._engine,
            choices,
            prompt_tokens=sum(len(one.token_ids) for one in inputs),
            timeout_s=request.timeout_s or self._config.timeout or None,
        )

    def _decoder(self, one: _Input, sampling: SamplingParams, *, choice: int, is_first: bool) -> ChoiceDecoder:
        return ChoiceDecoder(
            self._tokenizer,
            choice=choice,
            prompt_ids=one.token_ids,
            sampling=sampling,
            stream_interval=self._config.stream_interval,
            echo=one.echo,
            counts_prompt=is_first,
        )

    def _engine_sampling(
        self, sampling: SamplingParams, token_ids: Sequence[int], info: RunnerInfo, *, param: str
    ) -> SamplingParams:
        """What a sequence of the engine gets, but for its seed: a single choice, everything resolved, no text."""
        check_token_ids(token_ids, vocab_size=info.vocab_size, param=param)
        max_tokens = max_output_tokens(
            sampling,
            num_prompt=len(token_ids),
            max_model_len=info.max_model_len,
            default=self._config.max_tokens,
            param=param,
        )
        eos = () if sampling.ignore_eos else sorted(self._tokenizer.eos_token_ids)
        stop_token_ids = dict.fromkeys((*sampling.stop_token_ids, *(i for i in eos if 0 <= i < info.vocab_size)))
        return sampling.replace(n=1, stop=(), max_tokens=max_tokens, stop_token_ids=tuple(stop_token_ids))


def _size(message: Message) -> int:
    """Characters of a message's content."""
    content = message.content or ""
    return len(content) if isinstance(content, str) else sum(len(part.text) for part in content)


async def _run(function: Callable[..., _Result], *args: object, size: int) -> _Result:
    """Call `function` here if there is little to do, on a thread if `size` characters would hold up the event loop."""
    if size < _LONG_TEXT:
        return function(*args)
    return await asyncio.to_thread(function, *args)
