"""Breakpoints are lengths of real beginnings: their tokens are those of the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from vllm_mlx.chat.breakpoints import MAX_MESSAGE_ENDS, breakpoints, message_ends
from vllm_mlx.chat.render import ChatTemplate
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.chat import Message

SYSTEM = Message("system", "The capital of France is Paris.")
TURNS = tuple(Message(("user", "assistant")[i % 2], "The quick brown fox. " * (i + 1)) for i in range(9))


def found(tokenizer: Tokenizer, messages: Sequence[Message], source: str | None = None) -> list[str]:
    """The text of each beginning."""
    template = ChatTemplate(source or tokenizer.chat_template or "", special_tokens=tokenizer.special_tokens)
    text = template.render(messages, {})
    segments = tokenizer.segments(text)
    ids = segments.token_ids

    def beginning(count: int) -> str:
        return template.render(messages[:count], {}, add_generation_prompt=False)

    lengths = breakpoints(messages, message_ends(text, segments.position, beginning=beginning))
    assert list(lengths) == sorted(set(lengths))
    return [tokenizer.decode(ids[:length], skip_special_tokens=False) for length in lengths]


def test_system_text_and_last_messages_end_at_breakpoints(byte_level: Tokenizer) -> None:
    messages = (SYSTEM, *TURNS)
    texts = found(byte_level, messages)
    assert len(texts) == MAX_MESSAGE_ENDS + 1
    assert texts[0].endswith("Paris.<|im_end|>\n")
    counts = [text.count("<|im_start|>") for text in texts]
    assert counts == [1, *range(len(messages) - MAX_MESSAGE_ENDS + 1, len(messages) + 1)]
    assert all(text.endswith("<|im_end|>\n") for text in texts)


def test_conversation_without_system_text_has_its_message_ends(byte_level: Tokenizer) -> None:
    assert len(found(byte_level, TURNS[:1])) == 1
    assert len(found(byte_level, TURNS[:3])) == 3


def test_messages_that_the_client_marked_end_at_breakpoints_too(byte_level: Tokenizer) -> None:
    marked = tuple(msgspec.structs.replace(one, is_breakpoint=i < 6) for i, one in enumerate(TURNS))
    counts = [text.count("<|im_start|>") for text in found(byte_level, marked)]
    assert counts == [3, 4, 5, 6, 7, 8, 9]


def test_beginnings_that_the_template_writes_differently_are_left_out(byte_level: Tokenizer) -> None:
    source = "{{ messages | length }} messages:{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    texts = found(byte_level, TURNS[:3], source + "{% if add_generation_prompt %}<|im_start|>{% endif %}")
    assert [text.count("<|im_end|>") for text in texts] == [3]


@pytest.mark.parametrize("source", ["{{ raise_exception('no') if messages | length < 3 }}{{ messages[0].content }}"])
def test_beginnings_that_the_template_refuses_are_left_out(byte_level: Tokenizer, source: str) -> None:
    assert found(byte_level, TURNS[:3], source) == []
