"""Fixed and free texts as Lark: what grammars of answers and of calls are put together from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from vllm_mlx.chat.shapes import ANY_TEXT, quoted
from vllm_mlx.chat.tokenizer import Tokenizer

Literal = Callable[[str], str]
"""A fixed text as a Lark expression; '' for the empty one."""
ANY = ANY_TEXT.strip("/")
"""The regular expression of any text."""

_TEXT_THEN_TOKEN = re.compile(r'(?P<text>"(?:[^"\\]|\\.)*")? ?(?P<rest><\[.*)', re.DOTALL)


def literal_writer(tokenizer: Tokenizer) -> Literal:
    """Writes fixed texts; special tokens in them, which no text can spell, are named by number."""
    pieces = {tokenizer.token_text(token): token for token in tokenizer.special_ids}
    marks = sorted(filter(None, pieces), key=len, reverse=True)
    cut = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None

    def literal(text: str) -> str:
        parts = cut.split(text) if cut is not None else [text]
        return " ".join(f"<[{pieces[part]}]>" if part in pieces else quoted(part) for part in parts if part)

    return literal


def has_tokens(expression: str) -> bool:
    """Whether special tokens are part of a fixed text."""
    return _TEXT_THEN_TOKEN.match(expression) is not None


def in_regex(text: str) -> str:
    """A fixed text inside a regular expression of Lark."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")


def up_to(rule: str, end: str, *, body: str = ANY) -> list[str]:
    """The rule of a text (`body` is its regular expression) and of the first `end`, a Lark expression, behind it.

    Where the end begins with a special token, or has one behind a few characters, no text can hold it.
    """
    found = _TEXT_THEN_TOKEN.match(end)
    if found is None:
        return [f"{rule}[lazy]: /{body}/ {end}"]
    before = in_regex(json.loads(found["text"])) if found["text"] else ""
    return [f"{rule}: {rule.upper()} {found['rest']}", f"{rule.upper()}: /{body}{before}/"]
