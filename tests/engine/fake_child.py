"""The engine process of the client tests: a FakeRunner with faults. Run as `python fake_child.py SOCKET_FOLDER`.

`FAKE_ENGINE` in the environment is a JSON object: the fields of `FaultyFactory`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_mlx.cli.compose import grammars_of
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ModelError
from vllm_mlx.core.step import ProgressCallback, Step
from vllm_mlx.engine.child import run_child
from vllm_mlx.testing.fake import FakeRunner

POISON = 6666
"""A prompt that begins with it kills the process when it is computed."""
STALL = 7777
"""A prompt that begins with it makes the step hang."""
CRASH = 8888
"""A prompt that begins with it raises RuntimeError in the runner."""


class FaultyRunner(FakeRunner):
    """A FakeRunner that obeys the tokens above."""

    def build(self, step: Step) -> Any:
        for row in step.prefills:
            if row.start == 0 and row.token_ids[0] == POISON:
                os.kill(os.getpid(), signal.SIGKILL)
            if row.start == 0 and row.token_ids[0] == STALL:
                time.sleep(3600)
            if row.start == 0 and row.token_ids[0] == CRASH:
                raise RuntimeError("the device is lost")
        return super().build(step)


@dataclass
class FaultyFactory:
    """Makes a FaultyRunner, or fails to."""

    options: dict[str, Any] = field(default_factory=dict)
    """Of FakeRunner."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of Config."""
    broken_if: str | None = None
    """A path: while it exists, every start fails."""
    model_error: str | None = None
    """The model cannot be loaded, for this reason."""
    hangs: bool = False
    """Loading never ends."""
    tokenizer: str | None = None
    """Folder of the tokenizer that grammars are applied to; without one there are none."""

    def __call__(self, progress: ProgressCallback) -> FaultyRunner:
        progress("loading", 0.5)
        if self.model_error:
            raise ModelError(self.model_error)
        if self.broken_if and Path(self.broken_if).exists():
            raise RuntimeError("no device found")
        if self.hangs:
            time.sleep(3600)
        return FaultyRunner(**self.options)


if __name__ == "__main__":
    factory = FaultyFactory(**json.loads(os.environ["FAKE_ENGINE"]))
    config = Config(**factory.config)
    grammars = grammars_of(Path(factory.tokenizer), config) if factory.tokenizer else None
    sys.exit(run_child(sys.argv[1], factory=factory, config=config, grammars=grammars))
