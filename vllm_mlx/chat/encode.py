"""Requests to prompts: template, tokenizer, salt, and what is to be known of a prompt besides its tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec

from vllm_mlx.chat.breakpoints import breakpoints, marks, message_ends
from vllm_mlx.chat.infill import find_infill
from vllm_mlx.chat.limits import check_text, check_token_ids
from vllm_mlx.chat.plain_tools import tool_variables
from vllm_mlx.chat.render import ChatTemplate
from vllm_mlx.chat.seen import Outline, part_key
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.chat.volatile import num_common, stable_messages
from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.chat import ChatRequest, CompletionRequest, Message, Tool
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.prompt import Prompt, prompt_salt
from vllm_mlx.core.step import RunnerInfo


class Encoded(msgspec.Struct, frozen=True):
    """One prompt, ready for the engine."""

    prompt: Prompt
    outline: Outline
    text: str = ""
    """What was encoded; empty where token ids were given."""
    tail: str = ""
    """Of a conversation: what the template wrote behind the last message; it may open reasoning."""
    echo: str = ""
    """The text that its choices begin with."""
    breakpoints: tuple[int, ...] = ()
    """See `core.messages.Submit`."""
    marks: tuple[tuple[int, int], ...] = ()
    """Beginnings that the client wants to be kept: tokens, and seconds."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer to this prompt, besides those of the model and the request."""


class PromptEncoder:
    """Makes prompts for one model. Keeps no state, so it may be called on any thread."""

    def __init__(self, tokenizer: Tokenizer, *, config: Config) -> None:
        """Raises ModelError if the model's chat template is not valid."""
        self._tokenizer = tokenizer
        self._config = config
        source = tokenizer.chat_template
        self._template = ChatTemplate(source, special_tokens=tokenizer.special_tokens) if source is not None else None

    @property
    def renders_tools(self) -> bool:
        """Whether the template shows the model what tools there are."""
        return self._template is not None and self._template.renders_tools

    def chat(
        self, request: ChatRequest, info: RunnerInfo, *, add_generation_prompt: bool = True, wants_tail: bool = False
    ) -> Encoded:
        """Render and encode a conversation; the template writes the special tokens itself.

        `add_generation_prompt`: False leaves out the beginning of an answer whatever the request says.
        `wants_tail`: find out `Encoded.tail`, at the cost of one more rendering.

        Raises:
            InvalidRequest: there is no template, or it refuses the messages, or they are too long, or the model lacks
                one of their tokens.
        """
        if self._template is None:
            raise InvalidRequest(
                "This model has no chat template. Use /v1/completions, or put a chat_template.jinja into its folder.",
                param="messages",
            )
        kwargs = {**(self._config.default_chat_template_kwargs or {}), **request.template_kwargs}
        messages = stable_messages(request.messages) if self._config.stable_prompts else request.messages
        tools = shown_tools(request)
        render = functools.partial(self._template.render, template_kwargs=kwargs, tools=tools)

        @functools.cache
        def beginning(num_messages: int) -> str:
            return render(messages[:num_messages], add_generation_prompt=False)

        if request.continue_final_message and add_generation_prompt:
            text, tail = _open_ended(messages, beginning(len(messages)))
        elif add_generation_prompt and request.add_generation_prompt:
            text = render(messages, add_generation_prompt=True)
            tail = _tail(text, beginning(len(messages))) if wants_tail else ""
        else:
            text, tail = beginning(len(messages)), ""
        check_text(text, self._tokenizer, max_model_len=info.max_model_len, param="messages")
        segments = self._tokenizer.segments(text)
        check_token_ids((segments.largest_id,), vocab_size=info.vocab_size, param="messages")
        ends = message_ends(text, segments.position, beginning=beginning)
        can_be_cut = all(layer.layout is Layout.PAGES for layer in info.cache.layers)
        found = () if can_be_cut else breakpoints(messages, ends)
        salt = prompt_salt(tenant=request.tenant)
        outline, kept = _outline(messages, tools, salt), marks(messages, ends)
        return Encoded(Prompt(segments.token_ids, salt), outline, text, tail, breakpoints=found, marks=kept)

    def completion(self, request: CompletionRequest, info: RunnerInfo) -> list[Encoded]:
        """Encode raw texts; token ids are taken as they are.

        Raises:
            InvalidRequest: a text is too long, or the model lacks a token.
        """
        if request.suffix is not None:
            return self._infill(request, request.suffix, info)
        salt, encoded = prompt_salt(tenant=request.tenant), []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                check_text(prompt, self._tokenizer, max_model_len=info.max_model_len, param="prompt")
                token_ids, text = self._tokenizer.encode(prompt, add_special_tokens=True), prompt
                check_token_ids(token_ids, vocab_size=info.vocab_size, param="prompt")
            else:
                check_token_ids(prompt, vocab_size=info.vocab_size, param="prompt")
                token_ids, text = prompt, self._tokenizer.decode(prompt) if request.echo else ""
            encoded.append(Encoded(Prompt(token_ids, salt), Outline(salt), text, echo=text if request.echo else ""))
        return encoded

    def _infill(self, request: CompletionRequest, suffix: str, info: RunnerInfo) -> list[Encoded]:
        """Prompts for what is missing between each text and the suffix."""
        infill = find_infill(self._tokenizer)
        if infill is None:
            raise InvalidRequest(
                "suffix is not supported by this model: its vocabulary has no tokens for filling in.", param="suffix"
            )
        encode = functools.partial(self._tokenizer.encode, add_special_tokens=False)
        check_text(suffix, self._tokenizer, max_model_len=info.max_model_len, param="suffix")
        salt, encoded = prompt_salt(tenant=request.tenant), []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                check_text(prompt, self._tokenizer, max_model_len=info.max_model_len, param="prompt")
            prefix = encode(prompt) if isinstance(prompt, str) else prompt
            token_ids = infill.token_ids(prefix, encode(suffix))
            check_token_ids(token_ids, vocab_size=info.vocab_size, param="prompt")
            encoded.append(Encoded(Prompt(token_ids, salt), Outline(salt), stop_token_ids=infill.stop_token_ids))
        return encoded


def shown_tools(request: ChatRequest) -> tuple[Tool, ...]:
    """The tools that the prompt lists: none if none may be called, else those that may be and are to be listed.

    Where a grammar sees to it that no other is called, all are told, so that a turn which forces a call begins with the
    same tokens as the turns around it.
    """
    tools = request.tools if request.tool_choice.mode == "required" else callable_tools(request)
    return tuple(tool for tool in tools if tool.is_listed)


def callable_tools(request: ChatRequest) -> tuple[Tool, ...]:
    """The tools that may be called."""
    choice = request.tool_choice
    if choice.mode == "none":
        return ()
    return tuple(tool for tool in request.tools if not choice.names or tool.name in choice.names)


def _open_ended(messages: Sequence[Message], text: str) -> tuple[str, str]:
    """A prompt that ends where the last message's text does, and that text."""
    last = _text(messages[-1]).rstrip()
    end = text.rfind(last) + len(last)
    if messages[-1].role != "assistant" or not last or end < len(last):
        raise InvalidRequest(
            "continue_final_message needs a last message of the assistant that has text, and a template that shows it.",
            param="continue_final_message",
        )
    return text[:end], last


def _tail(text: str, without: str) -> str:
    """What is behind the last message: the beginning of an answer."""
    return text.removeprefix(without) if text.startswith(without) else text[num_common(text, without) :]


def _outline(messages: Sequence[Message], tools: Sequence[Tool], salt: bytes) -> Outline:
    system = "\n".join(_text(message) for message in messages if message.role == "system")
    opening = next((_text(message) for message in messages if message.role != "system"), "")
    shown = msgspec.json.encode(tool_variables(tools)).decode() if tools else ""
    return Outline(salt, tools=part_key(shown), system=part_key(system), opening=part_key(opening))


def _text(message: Message) -> str:
    content = message.content or ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
