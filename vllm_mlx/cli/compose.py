"""Puts an engine together: the one place that knows both the engine and what it runs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from vllm_mlx.core.config import Config
from vllm_mlx.core.grammar import Grammars, GrammarsFactory
from vllm_mlx.core.messages import EngineClient
from vllm_mlx.core.step import ProgressCallback
from vllm_mlx.kv.tiers.ssd import check_settings
from vllm_mlx.runner import blas

ENGINE_VARIABLE = "_VLLM_MLX_ENGINE"
"""Environment variable in which the engine process finds what to load, as JSON."""
CHILD_COMMAND = (sys.executable, "-m", "vllm_mlx.cli.engine")


def open_engine(config: Config, path: Path, *, on_progress: ProgressCallback | None = None) -> EngineClient:
    """The engine for the model folder `path`, not started yet. Called on the event loop that will use it.

    Raises:
        ConfigError: the settings name a folder or a key for the cache on disk that cannot be used.
    """
    check_settings(config)
    if config.engine == "thread":
        blas.preload_here()
        from vllm_mlx.engine.thread import ThreadEngine
        from vllm_mlx.runner.device import end_streams
        from vllm_mlx.runner.load import create_runner_factory

        factory = create_runner_factory(path, config)
        return ThreadEngine(
            factory, config, on_progress=on_progress, leave_thread=end_streams, grammars=grammars_of(path, config)
        )
    from vllm_mlx.engine.process import ProcessEngine

    environment = _child_environment(config, path)
    return ProcessEngine(CHILD_COMMAND, config=config, env=environment, on_progress=on_progress)


def grammars_of(path: Path, config: Config) -> GrammarsFactory:
    """What an engine for the model folder `path` needs to follow grammars; loads nothing yet."""

    def load(vocab_size: int) -> Grammars:
        from vllm_mlx.chat.grammars import TokenGrammars
        from vllm_mlx.chat.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(path, trust_remote_code=config.trust_remote_code)
        return TokenGrammars(tokenizer, vocab_size=vocab_size)

    return load


def read_child_environment() -> tuple[Path, Config]:
    """The other end of `open_engine`: what this engine process shall load."""
    given = json.loads(os.environ.pop(ENGINE_VARIABLE))
    return Path(given["path"]), Config(**given["config"])


def _child_environment(config: Config, path: Path) -> dict[str, str]:
    """Variables that the engine process gets besides ours; it has no use for the API key."""
    fields = dataclasses.asdict(dataclasses.replace(config, api_key=None))
    order = json.dumps({"path": str(path), "config": fields})
    return {ENGINE_VARIABLE: order, "VLLM_MLX_API_KEY": "", **blas.preload_environment()}
