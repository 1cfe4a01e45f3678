"""A fake model that works like a coding agent's: it reads a file, edits it, and says that it is done.

What it calls are the tools that the request offers, whatever the client names them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from fixtures_text import EOS_ID
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
START_ID = 1
HEADER = "assistant\n"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>\n"
    "Call them as <tool_call>\n{\"name\": ..., \"arguments\": ...}\n</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
READERS = ("Read", "read", "read_file", "exec_command", "shell", "shell_command", "read_files")
EDITORS = ("apply_patch", "Edit", "edit", "exec_command", "shell", "shell_command", "editor")
PATCH = "*** Begin Patch\n*** Update File: {path}\n@@\n-{before}\n+{after}\n*** End Patch\n"
IDLE = "Ready."
DONE = "The greeting is changed."


def write_agent_model(folder: Path, corpus: list[str]) -> tokenizers.Tokenizer:
    """A model folder without weights, whose tokenizer knows the words of `corpus`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, show_progress=False, special_tokens=list(SPECIAL), initial_alphabet=alphabet
    )
    backend.train_from_iterator(corpus, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend


class AgentScript:
    """Changes `old` to `new` in `path` when the conversation holds `task`; else says `IDLE`.

    What it says is a pure function of the prompt. The file is there, and what a tool reads of it must come back.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, task: str, path: Path, old: str, new: str) -> None:
        self._backend = backend
        self._task = task
        self._content = path.read_text().strip()
        self._changed = self._content.replace(old, new)
        self._values: dict[str, Any] = {
            **dict.fromkeys(("old_string", "oldString", "old_text", "old_str"), old),
            **dict.fromkeys(("new_string", "newString", "new_text", "new_str"), new),
        }
        self._edit = f"sed -i 's/{old}/{new}/'"
        self.point_to(path)
        self._header = backend.encode(HEADER, add_special_tokens=False).ids
        self._answer = functools.cache(self._answer_to)
        self.turns: list[tuple[int, str]] = []
        """Of each prompt with the task and tools: how many tool results it holds, and what is answered."""

    def point_to(self, path: Path) -> None:
        """What is called from now on is about this file."""
        self._values |= {
            **dict.fromkeys(("file_path", "filePath", "absolute_path", "path"), str(path)),
            "files": [{"path": str(path)}],
            "input": PATCH.format(path=path, before=self._content, after=self._changed),
        }
        self._shell = {"read": f"cat {path}", "edit": f"{self._edit} {path}"}

    def __call__(self, tokens: tuple[int, ...]) -> int:
        end = len(tokens) - tokens[::-1].index(START_ID) + len(self._header)
        ids = self._answer(tokens[:end])
        done = len(tokens) - end
        return ids[done] if done < len(ids) else EOS_ID

    def _answer_to(self, prompt: tuple[int, ...]) -> list[int]:
        text = self._say(self._backend.decode(list(prompt), skip_special_tokens=False))
        return self._backend.encode(text, add_special_tokens=False).ids

    def _say(self, prompt: str) -> str:
        tools = functions_of(prompt)
        if not tools or self._task not in prompt:
            return IDLE
        num_results = prompt.count("<|im_start|>tool\n")
        text = DONE
        if num_results and self._content not in prompt:
            text = "The tool did not show the file."
        elif num_results < 2:
            text = self._call(tools, READERS if num_results == 0 else EDITORS, ("read", "edit")[num_results])
        self.turns.append((num_results, text))
        return text

    def _call(self, tools: Mapping[str, Any], names: tuple[str, ...], purpose: str) -> str:
        """A call of the first of these tools that there is."""
        name = next((name for name in names if name in tools), None)
        if name is None:
            return f"None of {names} is offered, only {sorted(tools)}."
        schema = tools[name].get("parameters") or {}
        given = {**self._values, "cmd": self._shell[purpose], "command": self._shell[purpose]}
        if schema.get("properties", {}).get("command", {}).get("type") == "array":
            given["command"] = ["bash", "-c", self._shell[purpose]]
        arguments = {part: given[part] for part in schema.get("properties", {}) if part in given}
        call = json.dumps({"name": name, "arguments": arguments})
        return f"<tool_call>\n{call}\n</tool_call>"


def functions_of(prompt: str) -> dict[str, dict[str, Any]]:
    """The tools that a prompt begins with, by name."""
    found = re.search(r"<tools>\n(.*?)\n</tools>", prompt, re.DOTALL)
    return {tool["name"]: tool for tool in map(_function, found[1].split("\n"))} if found else {}


def _function(line: str) -> dict[str, Any]:
    value = json.loads(line)
    found: dict[str, Any] = value.get("function", value)
    return found
