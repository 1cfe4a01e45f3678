"""What is asked: sets of conversations, generated texts of a length, mixes of lengths, files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_mlx.bench.client import Message
from vllm_mlx.bench.words import draw_words
from vllm_mlx.core.errors import ConfigError

BUILT_IN = ("short", "medium", "long", "thinking")
NUM_OWN_WORDS = 5
"""Words that make a prompt unlike any other: 5 of about 500 give 3e13 beginnings."""

Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts under one name. Either conversations that are asked in turn, or lengths in words to generate."""

    name: str
    conversations: tuple[Conversation, ...] = ()
    lengths: tuple[int, ...] = ()
    is_block: bool = False
    """A mix: all its lengths belong into one run."""

    @property
    def size(self) -> int:
        """Different conversations or lengths."""
        return len(self.conversations or self.lengths)


@dataclass(frozen=True, slots=True)
class PromptWriter:
    """Writes the conversation of each request.

    A prompt begins with words of its own, so that no server answers from a prompt cache by accident; with `is_shared`
    they come last. After a system prompt, which is the same for all, they come first in what follows.
    """

    seed: int
    is_shared: bool = False
    system_prompt: str | None = None

    def write(self, prompts: PromptSet, index: int, *, run: str) -> Conversation:
        """The conversation of request `index`; the same for the same seed, run, set and index."""
        own = random.Random(f"{self.seed}/{run}/{prompts.name}/{index}")
        if prompts.lengths:
            return self._with_system(self._generated(prompts, index, run=run, own=own))
        conversation = prompts.conversations[index % prompts.size]
        mark = " ".join(draw_words(NUM_OWN_WORDS, own))
        if self.is_shared:
            return self._with_system((*conversation[:-1], _joined(conversation[-1], after=f" ({mark})")))
        return self._with_system((_joined(conversation[0], before=f"{mark}: "), *conversation[1:]))

    def _generated(self, prompts: PromptSet, index: int, *, run: str, own: random.Random) -> Conversation:
        order = list(prompts.lengths)
        random.Random(f"{self.seed}/{run}/{prompts.name}/order/{index // prompts.size}").shuffle(order)
        length = order[index % prompts.size]
        if not self.is_shared:
            return ({"role": "user", "content": " ".join(draw_words(length, own))},)
        common = random.Random(f"{self.seed}/{prompts.name}/{length}")
        num_own = min(NUM_OWN_WORDS, length)
        words = [*draw_words(length - num_own, common), *draw_words(num_own, own)]
        return ({"role": "user", "content": " ".join(words)},)

    def _with_system(self, conversation: Conversation) -> Conversation:
        if self.system_prompt is None:
            return conversation
        first = conversation[0]
        if first.get("role") == "system":
            return (_joined(first, before=f"{self.system_prompt}\n\n"), *conversation[1:])
        return ({"role": "system", "content": self.system_prompt}, *conversation)


def of_words(count: int) -> PromptSet:
    """Generated prompts of `count` words."""
    return PromptSet(f"{count} words", lengths=(count,))


def of_mix(parts: Sequence[tuple[int, int]]) -> PromptSet:
    """Generated prompts: (how many, of how many words), in random order."""
    name = ",".join(f"{count}x{words}" for count, words in parts)
    return PromptSet(f"mix {name}", lengths=tuple(w for count, w in parts for _ in range(count)), is_block=True)


def load_set(name: str, *, flag: str) -> PromptSet:
    """A built-in set by name, or a JSON file by path.

    A file holds conversations (a list of lists of messages), one conversation (a list of messages), or texts.

    Raises:
        ConfigError: it is neither, or the file is not of that shape; the message begins with `flag`.
    """
    if name in BUILT_IN:
        text = resources.files("vllm_mlx.bench").joinpath("prompt_sets", f"{name}.json").read_text(encoding="utf-8")
        return PromptSet(name, conversations=_conversations(json.loads(text)) or ())
    path = Path(name)
    value = read_json(path, flag=flag, otherwise=f", and no prompt set ({', '.join(BUILT_IN)})")
    found = _conversations(value)
    if not found:
        raise ConfigError(f"{flag}: {name} must hold a list of messages, of lists of messages, or of texts")
    return PromptSet(path.stem, conversations=found)


def read_json(path: Path, *, flag: str, otherwise: str = "") -> Any:
    """A JSON file's value. Raises ConfigError, beginning with `flag`, if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{flag}: {path} is no file{otherwise}") from None
    except OSError as error:
        raise ConfigError(f"{flag}: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{flag}: {path} is not JSON: {error}") from None


def is_conversation(value: Any) -> bool:
    """Whether a JSON value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _conversations(value: Any) -> tuple[Conversation, ...]:
    if not isinstance(value, list) or not value:
        return ()
    if is_conversation(value):
        return (tuple(value),)
    if all(isinstance(text, str) for text in value):
        return tuple(({"role": "user", "content": text},) for text in value)
    return tuple(map(tuple, value)) if all(map(is_conversation, value)) else ()


def _joined(message: Message, *, before: str = "", after: str = "") -> Message:
    """A message with more text. Where its content is a list of parts, the text becomes parts of it."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [*([_part(before)] if before else ()), *content, *([_part(after)] if after else ())]
        return {**message, "content": parts}
    return {**message, "content": f"{before}{content or ''}{after}"}


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
