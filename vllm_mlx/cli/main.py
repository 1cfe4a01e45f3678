"""`vllm-mlx`: finds the command, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from vllm_mlx import __version__
from vllm_mlx.cli.parser import CLIENT_COMMANDS, find_command, overview, parse
from vllm_mlx.cli.settings import ENV_PREFIX, make_config, unknown_variables
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError, EngineStartError, StartupError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 (failed), 2 (a flag or the model is wrong) or 130 (Ctrl-C)."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except EngineStartError as error:
        _complain(error.message)
        return EXIT_FAILURE
    except StartupError as error:
        _complain(error.message)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader of our output went away; stop Python from complaining again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        traceback.print_exc()
        _complain(f"unexpected {type(error).__name__}; this is a bug, please report it with the lines above")
        return EXIT_FAILURE


def _run(arguments: list[str]) -> int:
    if not arguments:
        print(overview(), file=sys.stderr)
        return EXIT_FAILURE
    if arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"vllm-mlx {__version__}")
        return 0
    command = find_command(arguments[0])
    if not command.groups:
        return _without_settings(command.name, arguments[1:])
    try:
        namespace = parse(command, arguments[1:])
    except SystemExit as exit_:  # argparse leaves this way after printing --help
        return int(exit_.code or 0)
    config = make_config(vars(namespace), os.environ)
    for line in [*getattr(namespace, "notices", []), *unknown_variables(os.environ)]:
        print(f"vllm-mlx: note: {line}", file=sys.stderr)
    return _dispatch(command.name, config, namespace)


def _without_settings(name: str, arguments: list[str]) -> int:
    """Run a command that has flags of its own only."""
    if name == "agents":
        from vllm_mlx.cli.agents import agents

        return agents(arguments)
    from vllm_mlx.cli.bench_serve import bench_serve

    return bench_serve(arguments)


def _dispatch(name: str, config: Config, given: argparse.Namespace) -> int:
    """Run the command; each brings its own imports, so that none pays for another's."""
    if name == "serve":
        from vllm_mlx.cli.serve import serve

        return serve(config)
    if name == "chat":
        from vllm_mlx.cli.chat import chat

        return chat(config)
    if name == "bench":
        from vllm_mlx.cli.bench import bench
        from vllm_mlx.cli.bench_options import BenchOptions

        return bench(config, BenchOptions.of(given))
    has_model = hasattr(given, "model") or bool(os.environ.get(f"{ENV_PREFIX}MODEL"))
    if name in CLIENT_COMMANDS:
        return _client_command(name, config, given, has_model=has_model)
    if name == "doctor":
        from vllm_mlx.cli.doctor import doctor

        return doctor(config, has_model=has_model, output_format=given.format)
    if name == "download":
        from vllm_mlx.cli.download import download

        return download(config)
    raise ConfigError(f"unknown command {name!r}")


def _client_command(name: str, config: Config, given: argparse.Namespace, *, has_model: bool) -> int:
    from vllm_mlx.cli.launch import connect, launch

    if name == "connect":
        return connect(config, client=given.client, url=given.url)
    words = given.client_arguments
    return launch(config, client=given.client, url=given.url, has_model=has_model, arguments=words)


def _complain(message: str) -> None:
    print(f"vllm-mlx: error: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
