"""Our server against its peers: the same model folder, the same requests, in turn, in one run.

    python benchmarks/peers/run.py [--peers mlx-lm,vllm-mlx,rapid-mlx] [--model FOLDER] [--rounds 3] [-- BENCH FLAGS]

Every peer gets a virtual environment of its own (made once, with uv). In each round every server is started, warmed,
measured with `vllm-mlx bench-serve`, and stopped, so that none takes time or memory from another; prompts are the same
for all servers in a round and new in the next. What counts are the ratios within a round. What follows `--` goes to
bench-serve; by default 100-word prompts, 32 tokens, 1 and 4 clients.

Without a package index, `--python PATH` names an interpreter that has the peers; then nothing is installed:

    python benchmarks/peers/run.py --peers mlx-lm --python "$(which python)" --model FOLDER --rounds 1 -- \\
        --prompt-words 100 --max-tokens 128 --concurrency 1,64 --num-requests 128
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from ratios import Measured, name_of, summarize, table  # noqa: E402
from servers import (  # noqa: E402
    OURS,
    SERVERS,
    Installation,
    Server,
    Unusable,
    free_port,
    install,
    last_words,
    wait_ready,
)
from serving import environment, float32_demo, started  # noqa: E402

from vllm_mlx.core.config import Config  # noqa: E402

DEFAULT_LOAD = ("--prompt-words", "100", "--max-tokens", "32", "--concurrency", "1,4", "--warmup", "1")


class Race:
    """All rounds of all servers."""

    def __init__(self, arguments: argparse.Namespace, load: list[str], *, model: Path, work: Path) -> None:
        self._arguments = arguments
        self._load = load
        self._model = model
        self._work = work
        self.measured = {name: Measured() for name in (OURS, *arguments.peers)}

    def run(self) -> None:
        """Until the last round; a server that cannot be installed takes no part."""
        installations = self._install()
        for number in range(self._arguments.rounds):
            for name, installation in installations.items():
                self._round(SERVERS[name], installation, number)

    def _install(self) -> dict[str, Installation]:
        found = {OURS: Installation(Path(sys.executable), is_foreign=False)}
        for name in self._arguments.peers:
            if self._arguments.python is not None:
                found[name] = Installation(self._arguments.python, is_foreign=False)
                continue
            say(f"{name}: installing {SERVERS[name].requirement}")
            try:
                found[name] = install(
                    SERVERS[name], self._arguments.environments, uv=find_uv(), backend=self._arguments.backend
                )
            except Unusable as error:
                self._note(name, str(error))
        return found

    def _round(self, server: Server, installation: Installation, number: int) -> None:
        log = self._work / f"{server.name}-{number}.log"
        try:
            with self._running(server, installation, log=log) as url:
                document = self._measure(server, url, number)
        except Unusable as error:
            self._note(server.name, str(error))
            return
        if document is None:
            self._note(server.name, f"stopped answering in round {number + 1}: {last_words(log)}")
            return
        self.measured[server.name].rounds[number] = {name_of(row): row for row in document["summary"]}
        for row in document["summary"]:
            speed = f"{row['throughput_tps'] or 0.0:.1f} tokens/s, {row['failures']} failed"
            say(f"round {number + 1}: {server.name}: {name_of(row)}: {speed}")

    @contextlib.contextmanager
    def _running(self, server: Server, installation: Installation, *, log: Path) -> Iterator[str]:
        """The server, ready; its address."""
        port = free_port()
        extra = tuple(self._arguments.our_flags.split()) if server.name == OURS else ()
        command = server.fill(installation, model=self._model, port=port, extra=extra)
        with tempfile.TemporaryDirectory(dir=self._work) as home:
            variables = {"HOME": home} if server.keeps_files else {}
            folder = None
            if installation.is_foreign:  # neither our path nor our folder: a peer's package is called vllm_mlx too
                variables["PYTHONPATH"], folder = "", self._work
            with started(command, log=log, variables=variables, folder=folder) as process:
                url = f"http://127.0.0.1:{port}"
                wait_ready(process, f"{url}{server.ready_path}", log=log)
                yield url

    def _measure(self, server: Server, url: str, number: int) -> dict[str, Any] | None:
        """What bench-serve found; None if nothing answered."""
        output = self._work / f"{server.name}-{number}.json"
        command = [sys.executable, "-m", "vllm_mlx.cli.main", "bench-serve", "--url", url, "--format", "json"]
        command += ["--output", str(output), "--repetitions", "1", "--seed", str(number), *self._load]
        if server.model_id is not None:
            command += ["--model", server.model_id.format(model=self._model)]
        done = subprocess.run(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
        )
        if not output.exists() or not output.stat().st_size:
            say(f"{server.name}: {done.stderr.decode(errors='replace').strip()}")
            return None
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    def _note(self, name: str, problem: str) -> None:
        say(f"{name}: {problem}")
        self.measured[name].errors.append(problem)


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def find_uv() -> str:
    """The installer: beside our interpreter, or on the path."""
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise SystemExit("uv is not here; install it, or name an interpreter that has the peers with --python")
    return found


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Our own, and those of bench-serve."""
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=lambda text: text.split(","), default=[n for n in SERVERS if n != OURS])
    parser.add_argument("--model", type=Path, help="a folder; without it, the demo model in float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", type=Path, help="an interpreter that has the peers; nothing is installed")
    parser.add_argument("--environments", type=Path, default=Config().cache_path / "peers", help="where they are kept")
    on_linux = "cpu" if platform.system() == "Linux" else None
    parser.add_argument("--backend", default=on_linux, help="MLX's extra to install: cpu, cuda12, cuda13")
    parser.add_argument("--our-flags", default="", help="more flags of our `serve`, in one argument")
    parser.add_argument("--logs", type=Path, help="keep logs and results of every round here")
    parser.add_argument("--output", type=Path, help="write all figures here, as JSON")
    arguments = parser.parse_args(given[:cut])
    if unknown := [name for name in arguments.peers if name not in SERVERS or name == OURS]:
        parser.error(f"unknown peer {unknown[0]}; there are {', '.join(n for n in SERVERS if n != OURS)}")
    return arguments, given[cut + 1 :] or list(DEFAULT_LOAD)


def main() -> None:
    arguments, load = read_arguments()
    model = arguments.model.resolve() if arguments.model else float32_demo()
    with contextlib.ExitStack() as stack:
        if arguments.logs is not None:
            arguments.logs.mkdir(parents=True, exist_ok=True)
            work = arguments.logs.resolve()
        else:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        race = Race(arguments, load, model=model, work=work)
        race.run()
    lines = summarize(race.measured)
    print(table(lines, race.measured))
    if arguments.output is not None:
        document = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "model": str(model),
            "load": load,
            "requirements": {name: SERVERS[name].requirement for name in race.measured},
            "summary": lines,
            "errors": {name: found.errors for name, found in race.measured.items() if found.errors},
            "rounds": {name: found.rounds for name, found in race.measured.items()},
        }
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
