"""The conversation that is replayed: a long system prompt, four tools, two calls and their results, an answer.

In the first two turns the model has no choice: they name the tool, and arguments are enumerations. So what is
checked is the server, not the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

TASK = "Change the greeting in notes.txt from hello to goodbye. Read the file before you edit it."
_RULE = (
    "Rule {number}: before a file is changed it is read, a change is as small as it can be, nothing outside the "
    "working folder is touched, and what was done is told in one sentence without praise."
)
NUM_RULES = 40
"""Some 2,000 tokens: enough to see what is computed again, and a fraction of what real agents send."""
NUM_QUICK_RULES = 4
_CALL_TOKENS = 256
_ANSWER_TOKENS = 48


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool that is offered."""

    name: str
    description: str
    properties: Mapping[str, Any]

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of its arguments."""
        return {
            "type": "object",
            "properties": self.properties,
            "required": list(self.properties),
            "additionalProperties": False,
        }


class Call(msgspec.Struct):
    """What the model called; built up while it streams."""

    call_id: str = ""
    name: str = ""
    arguments: str = ""


class Exchange(msgspec.Struct, frozen=True):
    """A call and what its tool said."""

    call_id: str
    name: str
    arguments: str
    """JSON."""
    result: str


class Step(msgspec.Struct, frozen=True):
    """One turn of the model."""

    calls: str | None
    """The tool that it must call; None: it may call one, or answer in words."""
    max_tokens: int
    """Most that it may write. An answer is cut off early: nobody reads it."""
    result: str = ""
    """What the tool then says."""


class Conversation(msgspec.Struct, frozen=True):
    """All that a request is made of, in no dialect."""

    system: str
    exchanges: tuple[Exchange, ...] = ()

    def after(self, call: Call, result: str) -> Conversation:
        """With one more exchange."""
        exchange = Exchange(call.call_id, call.name, call.arguments, result)
        return Conversation(self.system, (*self.exchanges, exchange))


def _path() -> dict[str, Any]:
    return {"type": "string", "description": "Path of the file.", "enum": ["notes.txt"]}


TOOLS = (
    ToolSpec("read_file", "Read a file of the working folder.", {"path": _path()}),
    ToolSpec(
        "edit_file",
        "Replace a text in a file, once.",
        {
            "path": _path(),
            "old_text": {"type": "string", "enum": ["hello"]},
            "new_text": {"type": "string", "enum": ["goodbye"]},
        },
    ),
    ToolSpec("list_files", "List the files of the working folder.", {"path": {"type": "string"}}),
    ToolSpec("run_command", "Run a command of the shell.", {"command": {"type": "string"}}),
)
STEPS = (
    Step("read_file", _CALL_TOKENS, "1\tSay hello to the world.\n2\tThen say it again.\n"),
    Step("edit_file", _CALL_TOKENS, "notes.txt: replaced 1 occurrence."),
    Step(None, _ANSWER_TOKENS),
)


def conversation(session: str, *, num_rules: int = NUM_RULES) -> Conversation:
    """The beginning. `session` comes first in the system prompt, so that no cache knows it yet."""
    rules = "\n".join(_RULE.format(number=number) for number in range(1, num_rules + 1))
    return Conversation(f"Session {session}. You are a coding agent that works with tools.\n\n{rules}")
