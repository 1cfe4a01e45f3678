"""Requests to prompts: template, tokenizer, salt, and what is to be known of a prompt besides its tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec

from vllm_mlx.chat.breakpoints import breakpoints
from vllm_mlx.chat.limits import check_text
from vllm_mlx.chat.render import ChatTemplate
from vllm_mlx.chat.seen import Outline, part_key
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.chat.volatile import stable_messages
from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.chat import ChatRequest, CompletionRequest, Message
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.prompt import Prompt, prompt_salt
from vllm_mlx.core.step import RunnerInfo


class Encoded(msgspec.Struct, frozen=True):
    """One prompt, ready for the engine."""

    prompt: Prompt
    outline: Outline
    echo: str = ""
    """The text that its choices begin with."""
    breakpoints: tuple[int, ...] = ()
    """See `core.messages.Submit`."""


class PromptEncoder:
    """Makes prompts for one model. Keeps no state, so it may be called on any thread."""

    def __init__(self, tokenizer: Tokenizer, *, config: Config) -> None:
        """Raises ModelError if the model's chat template is not valid."""
        self._tokenizer = tokenizer
        self._config = config
        source = tokenizer.chat_template
        self._template = ChatTemplate(source, special_tokens=tokenizer.special_tokens) if source is not None else None

    def chat(self, request: ChatRequest, info: RunnerInfo, *, add_generation_prompt: bool = True) -> Encoded:
        """Render and encode a conversation; the template writes the special tokens itself.

        Raises:
            InvalidRequest: there is no template, or it refuses the messages, or they are too long.
        """
        if self._template is None:
            raise InvalidRequest(
                "This model has no chat template. Use /v1/completions, or put a chat_template.jinja into its folder.",
                param="messages",
            )
        kwargs = {**(self._config.default_chat_template_kwargs or {}), **request.template_kwargs}
        messages = stable_messages(request.messages) if self._config.stable_prompts else request.messages
        render = functools.partial(self._template.render, template_kwargs=kwargs)
        text = render(messages, add_generation_prompt=add_generation_prompt)
        check_text(text, self._tokenizer, max_model_len=info.max_model_len, param="messages")
        encode = functools.partial(self._tokenizer.encode, add_special_tokens=False)
        token_ids = encode(text)
        found: tuple[int, ...] = ()
        if any(layer.layout is not Layout.PAGES for layer in info.cache.layers):
            without_prompt = functools.partial(render, add_generation_prompt=False)
            found = breakpoints(messages, text, token_ids, render=without_prompt, encode=encode)
        salt = prompt_salt(tenant=request.tenant)
        return Encoded(Prompt(token_ids, salt), _outline(messages, salt), breakpoints=found)

    def completion(self, request: CompletionRequest, info: RunnerInfo) -> list[Encoded]:
        """Encode raw texts; token ids are taken as they are. Raises InvalidRequest for texts that are too long."""
        salt, encoded = prompt_salt(tenant=request.tenant), []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                check_text(prompt, self._tokenizer, max_model_len=info.max_model_len, param="prompt")
                token_ids, text = self._tokenizer.encode(prompt, add_special_tokens=True), prompt
            else:
                token_ids, text = prompt, self._tokenizer.decode(prompt) if request.echo else ""
            encoded.append(Encoded(Prompt(token_ids, salt), Outline(salt), text if request.echo else ""))
        return encoded


def _outline(messages: Sequence[Message], salt: bytes) -> Outline:
    system = "\n".join(_text(message) for message in messages if message.role == "system")
    opening = next((_text(message) for message in messages if message.role != "system"), "")
    return Outline(salt, system=part_key(system), opening=part_key(opening))


def _text(message: Message) -> str:
    content = message.content or ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
