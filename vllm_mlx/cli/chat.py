"""`vllm-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Any

from vllm_mlx.cli.display import Display
from vllm_mlx.core import log
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import RequestError
from vllm_mlx.core.messages import FinishReason
from vllm_mlx.llm import LLM, Chunk

PROMPT = "> "
HELP = """\
/clear  forget the conversation
/exit   leave (so do Ctrl-D, and Ctrl-C while nothing is being written)
/help   this text
Ctrl-C stops an answer."""
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_UNPRINTABLE = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")
"""Control characters, which could drive the terminal."""


def chat(config: Config) -> int:
    """Talk until the input ends; returns the exit code: 0, or 1 if a question could not be answered.

    Raises:
        StartupError: the model or the engine cannot be had.
    """
    log.setup("warning")
    with Display() as display:
        llm = LLM.from_config(config, progress=display)
    with llm:
        return _Conversation(llm, config.model_name, is_terminal=sys.stdin.isatty()).run()


class _Conversation:
    """Reads questions and prints answers. Without a terminal, every line of the input is a question."""

    def __init__(self, llm: LLM, name: str, *, is_terminal: bool) -> None:
        self._llm = llm
        self._name = name
        self._is_terminal = is_terminal
        self._messages: list[dict[str, Any]] = []
        self._has_failed = False
        self._is_thinking = False

    def run(self) -> int:
        """Until the input ends, or /exit."""
        if self._is_terminal:
            import readline  # noqa: F401  line editing and history in input()

            info = self._llm.info
            print(f"{self._name} on {info.backend}, context {info.max_model_len:,} tokens. /help shows the commands.")
        while (line := self._read()) is not None and line != "/exit":
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)
        return int(self._has_failed)

    def _read(self) -> str | None:
        """The next line; None at the end."""
        try:
            return input(PROMPT if self._is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            if self._is_terminal:
                print()
            return None

    def _command(self, line: str) -> None:
        if line == "/help":
            print(HELP)
        elif line == "/clear":
            self._messages.clear()
            print("Conversation forgotten.")
        else:
            print(f"Unknown command {line}; /help shows what there is.", file=sys.stderr)

    def _show(self, chunk: Chunk) -> None:
        """Print a piece; what the model thinks stands in lines of its own, dimmed on a terminal."""
        thought, text = chunk.reasoning.translate(_UNPRINTABLE), chunk.text.translate(_UNPRINTABLE)
        if self._is_thinking and text:
            print()
        self._is_thinking = bool(thought) or (self._is_thinking and not text and chunk.finish_reason is None)
        print(f"{_DIM}{thought}{_PLAIN}" if thought and sys.stdout.isatty() else thought + text, end="", flush=True)

    def _answer(self, question: str) -> None:
        """Print an answer as it comes, and remember both; a refused question is forgotten."""
        self._messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        note = ""
        try:
            for chunk in self._llm.stream(self._messages):
                pieces.append(chunk.text)
                self._show(chunk)
                if chunk.finish_reason is FinishReason.LENGTH:
                    note = "[the limit of tokens is reached]"
        except KeyboardInterrupt:
            note = "[stopped]"
        except RequestError as error:
            self._messages.pop()
            self._has_failed = True
            print(f"vllm-mlx: error: {error.message}", file=sys.stderr)
            return
        print(f" {note}" if note else "")
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
