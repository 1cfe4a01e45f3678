"""What the prefix cache is worth: time to the first token of a long prompt, cold and when it was seen before.

    python benchmarks/prefix_cache.py [--peers mlx-lm,vllm-mlx] [--model FOLDER] [--tokens 6000] [--rounds 3]
    python benchmarks/prefix_cache.py --kinds [llama,mamba2,...] [--tokens 6000] [--rounds 3]
    python benchmarks/prefix_cache.py --recorded DIR [--clients pi-local,cn] [--model FOLDER]
    python benchmarks/prefix_cache.py --host

The first starts our server and its peers in turn (installed once, as by `peers/run.py`): the prompt for the first time,
again, with another last message, and again after a restart with the same folder for the disk, where there is such a
thing. `--kinds` measures our engine alone, with small random models of every kind of layer. `--recorded` replays the
recorded requests of coding agents. `--host` measures what matching costs, and needs no MLX. Every round has prompts of
its own; percentages are of the cold time in the same round, and their medians are shown. `--output` keeps all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

from prefix_tables import table  # noqa: E402
from serving import float32_demo  # noqa: E402

from vllm_mlx.core.config import Config  # noqa: E402

PEERS = ("mlx-lm", "vllm-mlx")


def measure_servers(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Ours and the peers, over HTTP."""
    from prefix_servers import Measurement

    measurement = Measurement(given, model=model_of(given), work=work)
    measurement.run()
    print(table(measurement.seconds, first="server"))
    for name, problem in measurement.errors.items():
        print(f"- {name}: {problem}")
    return {"seconds": measurement.seconds, "tokens": measurement.tokens, "errors": measurement.errors}


def measure_kinds(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Our engine with small models."""
    from prefix_kinds import KINDS, KindsMeasurement

    kinds = given.kinds.split(",") if given.kinds else list(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise SystemExit(f"--kinds: there is no {unknown[0]}, only {', '.join(KINDS)}")
    measurement = KindsMeasurement(num_tokens=given.tokens, rounds=given.rounds, work=work)
    measurement.run(kinds)
    print(table(measurement.seconds, first="model"))
    return {"seconds": measurement.seconds, "tokens": measurement.tokens}


def measure_recorded(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Recorded conversations; nothing without the folder."""
    from prefix_recorded import CLIENTS, Replay, recorded_table

    if not given.recorded.is_dir():
        print(f"skipped: {given.recorded} does not exist")
        return {}
    replay = Replay(model=model_of(given), work=work)
    replay.run(given.recorded, given.clients.split(",") if given.clients else CLIENTS)
    print(recorded_table(replay.turns))
    return {"turns": msgspec.to_builtins(replay.turns)}


def measure_host() -> dict[str, Any]:
    """Matching, and bytes for each page."""
    from prefix_host import CACHED_PAGES, POOL_PAGES, PROMPT_TOKENS, measure_host

    cost = measure_host()
    print(f"prompt of {PROMPT_TOKENS:,} tokens, {CACHED_PAGES:,} pages remembered, medians:")
    print(f"  look up, all found     {cost.lookup_hit_ms:6.1f} ms")
    print(f"  admit, all found       {cost.admit_hit_ms:6.1f} ms")
    print(f"  admit, nothing found   {cost.admit_miss_ms:6.1f} ms")
    print(f"  release                {cost.release_ms:6.1f} ms")
    print(f"{POOL_PAGES:,} pages, all remembered: {cost.pool_bytes_per_page:.0f} bytes a page")
    found: dict[str, Any] = msgspec.to_builtins(cost)
    return found


def model_of(given: argparse.Namespace) -> Path:
    """The folder to serve."""
    return Path(given.model).resolve() if given.model else float32_demo()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kinds", nargs="?", const="", metavar="TYPES", help="small models of these types; all of them")
    what.add_argument("--recorded", type=Path, metavar="DIR", help="one folder of recorded requests for each client")
    what.add_argument("--host", action="store_true", help="what matching costs")
    parser.add_argument("--clients", help="with --recorded: which")
    parser.add_argument("--peers", type=lambda text: [p for p in text.split(",") if p], default=list(PEERS))
    parser.add_argument("--model", help="a folder; without it, the demo model in float32")
    parser.add_argument("--tokens", type=int, default=6000, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environments", type=Path, default=Config().cache_path / "peers", help="where peers are kept")
    on_linux = "cpu" if platform.system() == "Linux" else None
    parser.add_argument("--backend", default=on_linux, help="MLX's extra to install: cpu, cuda12, cuda13")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if given.host:
            found = measure_host()
        elif given.recorded is not None:
            found = measure_recorded(given, work)
        elif given.kinds is not None:
            found = measure_kinds(given, work)
        else:
            found = measure_servers(given, work)
    if given.output is not None:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        asked = {"arguments": sys.argv[1:]}
        given.output.write_text(json.dumps(about | asked | found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
