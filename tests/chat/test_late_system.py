"""System messages between turns, with templates that show them and templates that refuse or move them."""

from __future__ import annotations

import pytest

from vllm_mlx.chat.render import ChatTemplate
from vllm_mlx.core.chat import Message, TextPart

ANYWHERE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}[{{ m.role }}]{{ m.content }}"
    "{% endfor %}"
)
MOVES = (
    "{% for m in messages if m.role == 'system' %}[system]{{ m.content }}{% endfor %}"
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
LEAVES_OUT = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
    "[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
TURNS = (
    Message("system", "Be brief."),
    Message("user", (TextPart("one"), TextPart("two"))),
    Message("system", "Agents: none."),
    Message("assistant", "three"),
)


def render(source: str, *messages: Message) -> str:
    return ChatTemplate(source, special_tokens={}).render(messages, {})


def test_template_that_shows_them_gets_them_as_they_are() -> None:
    shown = "[system]Be brief.[user]one\ntwo[system]Agents: none.[assistant]three"
    assert render(ANYWHERE, *TURNS) == shown


@pytest.mark.parametrize("source", [REFUSES, MOVES, LEAVES_OUT])
def test_others_get_them_as_text_of_the_user_at_their_place(source: str) -> None:
    shown = "[system]Be brief.[user]one\ntwo\n<system>\nAgents: none.\n</system>[assistant]three"
    assert render(source, *TURNS) == shown


def test_turns_still_alternate() -> None:
    late = Message("system", "Now.")
    messages = (Message("user", "a"), late, Message("user", "b"), Message("assistant", "c"), late)
    shown = "[user]a\n<system>\nNow.\n</system>\nb[assistant]c[user]<system>\nNow.\n</system>"
    assert render(REFUSES, *messages) == shown


def test_what_was_rendered_stays_the_beginning_of_the_next_turn() -> None:
    before = render(REFUSES, *TURNS[:3])
    assert render(REFUSES, *TURNS, Message("user", "more")).startswith(before)
