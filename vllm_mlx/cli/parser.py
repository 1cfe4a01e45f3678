"""The parser of each command; nothing heavy is imported here, so that `--help` is quick."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from vllm_mlx.cli.bench_options import add_bench_flags
from vllm_mlx.cli.clients import clients
from vllm_mlx.cli.compat import add_old_flags, apply_old_flags
from vllm_mlx.cli.settings import GROUPS, add_arguments, did_you_mean, settings
from vllm_mlx.core.errors import ConfigError

EPILOG = "Every setting can also come from the environment: --max-num-seqs from VLLM_MLX_MAX_NUM_SEQS. A flag wins."


class Command(NamedTuple):
    """A subcommand and the groups of settings that it reads."""

    name: str
    summary: str
    groups: tuple[str, ...]


COMMANDS = (
    Command("serve", "Serve a model over HTTP.", tuple(GROUPS)),
    Command("chat", "Talk to a model in the terminal.", ("model", "engine", "defaults")),
    Command("bench", "Measure a model's engine, without HTTP.", ("model", "engine")),
    Command("bench-serve", "Measure a running server, over HTTP.", ()),
    Command("launch", "Run a coding agent on a local model.", tuple(GROUPS)),
    Command("connect", "Show how a coding agent is pointed at a running server.", ("server",)),
    Command("agents", "Check a running server with a coding agent's conversation.", ()),
    Command("doctor", "Check this machine, its GPU kernels and their speed.", ("model",)),
    Command("download", "Fetch a model without serving it.", ("model",)),
)
CLIENT_COMMANDS = ("launch", "connect")
_USAGE = {
    "launch": "CLIENT [MODEL] [settings] [-- the client's own arguments]",
    "connect": "CLIENT [--url URL] [settings]",
}


class Parser(argparse.ArgumentParser):
    """Raises instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument ([^:]*): ", lambda found: f"{found[1].split('/')[0]}: ", message))


def build_parser(command: Command) -> argparse.ArgumentParser:
    """The parser of one command."""
    parser = Parser(
        prog=f"vllm-mlx {command.name}",
        description=command.summary,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
        usage=f"vllm-mlx {command.name} {_USAGE.get(command.name, '[MODEL] [settings]')}",
    )
    if command.name in CLIENT_COMMANDS:
        add_client_flags(parser, names=tuple(clients()))
    if command.name != "connect":
        parser.add_argument(
            "model_argument",
            metavar="MODEL",
            nargs="?",
            help="A local folder, a Hugging Face id, a .gguf file, or `demo` (the same as --model).",
        )
    add_arguments(parser, settings(command.groups))
    if command.name == "bench":
        add_bench_flags(parser)
    if command.name in ("serve", "bench"):
        add_old_flags(parser)
    if command.name == "doctor":
        group = parser.add_argument_group("The report")
        text = "How it is printed. [table]"
        group.add_argument("--format", choices=("table", "json"), default="table", metavar="{table,json}", help=text)
    if command.name == "download":
        parser.add_argument("--timeout", dest="download_timeout", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        parser.add_argument("--retries", dest="download_retries", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def parse(command: Command, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command's arguments.

    Raises:
        ConfigError: a flag is unknown, lacks its value, or is not supported yet.
    """
    own, rest = list(arguments), None
    if command.name == "launch" and "--" in own:
        end = own.index("--")
        own, rest = own[:end], own[end + 1 :]
    namespace = parse_strictly(build_parser(command), own)
    namespace.client_arguments = rest or []
    if getattr(namespace, "model_argument", None) is not None:
        if getattr(namespace, "model", namespace.model_argument) != namespace.model_argument:
            raise ConfigError(f"the model is given twice: {namespace.model_argument} and --model {namespace.model}")
        namespace.model = namespace.model_argument
    apply_old_flags(namespace)
    return namespace


def add_client_flags(parser: argparse.ArgumentParser, *, names: Sequence[str]) -> None:
    """What `launch` and `connect` take besides settings."""
    parser.add_argument("client", metavar="CLIENT", help=f"{', '.join(names[:-1])} or {names[-1]}.")
    text = "A server that runs already, here or elsewhere; if not given, the one at --host and --port."
    parser.add_argument_group("The client").add_argument("--url", default=None, metavar="URL", help=text)


def parse_strictly(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse arguments, all of which must be known. Raises ConfigError, naming the one that is wrong."""
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigError(_describe_unknown(parser, unknown[0]))
    return namespace


def overview() -> str:
    """What `vllm-mlx --help` prints."""
    commands = "\n".join(f"  {command.name:<11} {command.summary}" for command in COMMANDS)
    return (
        "usage: vllm-mlx COMMAND [MODEL] [settings]\n\n"
        "Inference server on Apple's MLX: paged KV cache, continuous batching, OpenAI-compatible.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n"
        "  -h, --help     show this text; `vllm-mlx COMMAND --help` shows the settings\n"
        "  -V, --version  show the version\n\n"
        "start here: vllm-mlx serve demo"
    )


def find_command(word: str) -> Command:
    """The command of that name.

    Raises:
        ConfigError: there is none.
    """
    names = [command.name for command in COMMANDS]
    if word not in names:
        kind = "a command must come before flags" if word.startswith("-") else f"unknown command {word!r}"
        raise ConfigError(f"{kind} ({', '.join(names)}){did_you_mean(word, names)}")
    return COMMANDS[names.index(word)]


def _describe_unknown(parser: argparse.ArgumentParser, word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    name = word.split("=", maxsplit=1)[0]
    return f"unknown flag {name}{did_you_mean(name, parser._option_string_actions)}"
