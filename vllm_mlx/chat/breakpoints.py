"""Where in a prompt other prompts are likely to part from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

from vllm_mlx.core.chat import Message
from vllm_mlx.core.errors import InvalidRequest

MAX_MESSAGE_ENDS = 4
"""The next turn of a chat goes on after the last message; an agent sometimes takes back the last few."""
MAX_MARKED = 4
"""As many as Anthropic's API allows (https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching)."""


def breakpoints(messages: Sequence[Message], ends: Callable[[int], int]) -> tuple[int, ...]:
    """Lengths in tokens of the beginnings that end with the system text, with each of the last messages, and with those
    that the client marked. `ends` tells them: see `message_ends`.
    """
    return tuple(sorted({ends(count) for count in _cuts(messages)} - {0}))


def marks(messages: Sequence[Message], ends: Callable[[int], int]) -> tuple[tuple[int, int], ...]:
    """Beginnings that the client wants to be kept: tokens, rising, and seconds."""
    marked = [count for count, message in enumerate(messages, start=1) if message.keep_s]
    found = {ends(count): messages[count - 1].keep_s for count in marked[-MAX_MARKED:]}
    return tuple(sorted((position, keep_s) for position, keep_s in found.items() if position))


def message_ends(text: str, position: Callable[[int], int], *, beginning: Callable[[int], str]) -> Callable[[int], int]:
    """A function that says how many tokens of the prompt the first so many messages are; 0 where that is not known.

    `text` is the whole prompt, and `position` tells how many tokens its first so many characters are (0: unknown);
    `beginning` renders the first so many messages, without the generation prompt. A beginning that the template writes
    differently, or that does not end between two tokens, is not known: a wrong length would be useless, a missing one
    costs little.
    """

    @functools.cache
    def end(count: int) -> int:
        try:
            found = beginning(count)
        except InvalidRequest:
            return 0  # some templates refuse a system message alone
        if not found or not text.startswith(found):
            return 0
        return position(len(found)) if len(found) < len(text) else 0

    return end


def _cuts(messages: Sequence[Message]) -> Iterable[int]:
    """Numbers of messages after which to cut."""
    num_system = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    last = range(max(1, len(messages) - MAX_MESSAGE_ENDS + 1), len(messages) + 1)
    marked = [count for count, message in enumerate(messages, start=1) if message.is_breakpoint]
    return sorted({*last, *marked[-MAX_MARKED:], num_system} - {0})
