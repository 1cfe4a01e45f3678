"""The engine process: `python -m vllm_mlx.cli.engine SOCKET_FOLDER`, started by the server only."""

from __future__ import annotations

import signal
import sys

from vllm_mlx.cli.compose import grammars_of, read_child_environment
from vllm_mlx.core import log
from vllm_mlx.core.step import ProgressCallback, Runner


def main() -> int:
    """Serve the parent until it says stop or goes away; returns the exit code."""
    if len(sys.argv) != 2:
        print("usage: python -m vllm_mlx.cli.engine SOCKET_FOLDER (started by vllm-mlx itself)", file=sys.stderr)
        return 2
    path, config = read_child_environment()
    log.setup(config.log_level, config.log_format)
    leave_out_torch()

    from vllm_mlx.engine.child import run_child
    from vllm_mlx.runner.load import create_runner_factory

    create_runner = create_runner_factory(path, config)

    def factory(progress: ProgressCallback) -> Runner:
        runner = create_runner(progress)
        # A service manager signals every process of the service. When to stop is the server's decision: it says so.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return runner

    return run_child(sys.argv[1], factory=factory, config=config, grammars=grammars_of(path, config))


def leave_out_torch() -> None:
    """Have PyTorch count as not installed in this process.

    mlx-lm imports transformers, which imports PyTorch wherever that is installed: seconds and hundreds of megabytes for
    nothing that a model on MLX needs.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
