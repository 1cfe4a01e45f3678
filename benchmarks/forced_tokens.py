"""What it is worth that tokens without a choice are appended: the same answers with them, and sampled one by one.

    eval "$(python -m vllm_mlx.runner.blas)"
    python benchmarks/forced_tokens.py --model demo --rows 8 --tokens 96 [--schemas tests/samples/schemas.jsonl]

Two engines on threads of this process take turns: one appends, the other is told that its model cannot. All rows are
held to something, greedily: the schemas of the file in turn, with `--form` a text with gaps to be filled in, otherwise
the endless schema of `constrained.py`. Printed are tokens, steps and seconds of each, their ratios, and how many
answers are not the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import msgspec
from constrained import SCHEMA

from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.cli.compose import grammars_of
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import InvalidRequest
from vllm_mlx.core.messages import Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.shape import OutputShape
from vllm_mlx.core.step import ProgressCallback, Runner, RunnerInfo, Step
from vllm_mlx.engine.thread import ThreadEngine
from vllm_mlx.models.resolve import resolve
from vllm_mlx.runner import blas

Answers = dict[str, tuple[int, ...]]
FORM = (
    r"The ship [A-Z][a-z]{3,9} left the harbour of [A-Z][a-z]{3,9} with [1-9][0-9] sailors and [1-9][0-9] barrels of "
    r"water, and came back in [A-Z][a-z]{3,9} after [1-9][0-9] days at sea\."
)


class Counting:
    """A runner that counts its steps with rows, and may be one that takes one row per sequence only."""

    def __init__(self, inner: Runner, *, appends: bool) -> None:
        self._inner = inner
        self._appends = appends
        self.num_steps = 0

    @property
    def info(self) -> RunnerInfo:
        info = self._inner.info
        return msgspec.structs.replace(info, chunked_decode=info.chunked_decode and self._appends)

    def build(self, step: Step) -> Any:
        self.num_steps += step.num_tokens > 0
        return self._inner.build(step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Side:
    """One of the two engines."""

    def __init__(self, path: Path, config: Config, *, appends: bool) -> None:
        from vllm_mlx.runner.device import end_streams
        from vllm_mlx.runner.load import create_runner_factory

        create = create_runner_factory(path, config)

        def factory(progress: ProgressCallback) -> Runner:
            self.runner = Counting(create(progress), appends=appends)
            return self.runner  # type: ignore[return-value]

        self.engine = ThreadEngine(factory, config, leave_thread=end_streams, grammars=grammars_of(path, config))
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        """Of this process: on a busy machine they tell more."""
        self.num_steps = 0

    async def run(self, grammars: list[str], *, rows: int, tokens: int, name: str, prompt: tuple[int, ...]) -> Answers:
        """All grammars, so many at a time."""
        waiting, answers = list(enumerate(grammars)), {}

        async def work() -> None:
            while waiting:
                number, grammar = waiting.pop(0)
                sampling = SamplingParams(temperature=0.0, seed=number, max_tokens=tokens, grammar=grammar)
                found: list[int] = []
                async for output in self.engine.generate(Submit(f"{name}-{number}", Prompt(prompt), sampling)):
                    found += output.token_ids
                answers[str(number)] = tuple(found)

        before, begun, cpu_begun = self.runner.num_steps, time.perf_counter(), time.process_time()
        await asyncio.gather(*(work() for _ in range(rows)))
        self.seconds.append(time.perf_counter() - begun)
        self.cpu_seconds.append(time.process_time() - cpu_begun)
        self.num_steps = self.runner.num_steps - before
        return answers


async def grammars_for(options: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """One for each row, or one for each schema of the file that can be enforced."""
    constrainer, found = Constrainer(tokenizer), []
    if options.schemas is None:
        shape = OutputShape("regex", FORM) if options.form else OutputShape("json_schema", SCHEMA)
        return [await constrainer.grammar(shape, vocab_size=vocab_size)] * options.rows
    for line in options.schemas.read_text(encoding="utf-8").splitlines()[:: options.every]:
        shape = OutputShape("json_schema", json.loads(line)["schema"], "schema")
        try:
            found.append(await constrainer.grammar(shape, vocab_size=vocab_size))
        except InvalidRequest:
            continue
    return found


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns, after a round to warm up."""
    config = Config(model=options.model, max_num_seqs=options.rows + options.spare, prefix_cache=False)
    path = resolve(config, progress=lambda *_: None).path
    sides = {"one_by_one": Side(path, config, appends=False), "appended": Side(path, config, appends=True)}
    tokenizer = Tokenizer.load(path)
    prompt = tokenizer.encode("Write some JSON about a ship and its crew, please.\n", add_special_tokens=False)
    try:
        for side in sides.values():
            info = await side.engine.start()
        grammars = await grammars_for(options, tokenizer, info.vocab_size)
        answers: dict[str, Answers] = {}
        for round_ in range(options.rounds + 1):
            for kind, side in sides.items():
                given = {"rows": options.rows, "tokens": options.tokens, "prompt": tuple(prompt)}
                used = grammars if round_ else grammars[:1]
                answers[kind] = await side.run(used, name=f"{round_}", **given)
                if round_ == 0:
                    side.seconds.clear()
                    side.cpu_seconds.clear()
    finally:
        for side in sides.values():
            await side.engine.stop()
    return report(sides, answers)


def report(sides: dict[str, Side], answers: dict[str, Answers]) -> dict[str, Any]:
    """Of the last round, seconds the medians of all."""
    seconds = {kind: statistics.median(side.seconds) for kind, side in sides.items()}
    cpu_seconds = {kind: statistics.median(side.cpu_seconds) for kind, side in sides.items()}
    steps = {kind: side.num_steps for kind, side in sides.items()}
    differing = [name for name, tokens in answers["appended"].items() if tokens != answers["one_by_one"][name]]
    return {
        "answers": len(answers["appended"]),
        "answers_that_differ": len(differing),
        "tokens": sum(map(len, answers["appended"].values())),
        "steps": steps,
        "seconds": {kind: round(value, 2) for kind, value in seconds.items()},
        "cpu_seconds": {kind: round(value, 2) for kind, value in cpu_seconds.items()},
        "steps_ratio": round(steps["appended"] / steps["one_by_one"], 3),
        "seconds_ratio": round(seconds["appended"] / seconds["one_by_one"], 3),
        "cpu_seconds_ratio": round(cpu_seconds["appended"] / cpu_seconds["one_by_one"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=8, help="answers at a time")
    parser.add_argument("--spare", type=int, default=8, help="rows that a step has besides, for forced tokens")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--schemas", type=Path)
    kind.add_argument("--form", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="take each so-manieth schema of the file only")
    blas.preload_here()
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
