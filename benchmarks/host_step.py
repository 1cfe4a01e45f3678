"""Host time of one decode step: the scheduler's `plan()` and `commit()`, and what is sent to the server.

    python benchmarks/host_step.py [--rows 1,8,64,256] [--contexts 256,4096,32768] [--steps 200] [--rounds 5]
                                   [--inputs vllm_mlx.runner.geometry:BatchPlace] [--constrained]
                                   [--output results.json]

Real scheduler, real page tables, real messages; no runner: the results are made up between two measurements. Steps
overlap as in the engine (N + 1 is planned before N is committed). `--inputs` also times a callable that is given the
step's decode rows: what a runner does on the host to turn them into arrays. With `--constrained` all rows have a
grammar, whose masks are nobody's and take no time. All times are medians in microseconds but `mean` and `worst`, which
show the steps in which pages fill up and garbage is collected. Rounds alternate between the contexts, and the quietest
round of each counts, so that a busy machine is not taken for a slow program.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from vllm_mlx.core.cachespec import CacheSpec, LayerSpec, Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.grammar import Matcher
from vllm_mlx.core.messages import Outputs, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import DecodeRow, RunnerInfo, Step, StepResult
from vllm_mlx.engine.constraints import Constraints
from vllm_mlx.engine.scheduler import Scheduler

PAGE_SIZE = 32
VOCAB_SIZE = 50_000
STOP_TOKEN_ID = VOCAB_SIZE - 1
Inputs = Callable[[tuple[DecodeRow, ...]], Any]


@dataclass(frozen=True)
class Measured:
    """One line of the table; microseconds."""

    rows: int
    context: int
    plan: float
    commit: float
    send: float
    """Taking the outputs and encoding them as the process engine does."""
    inputs: float | None
    total: float
    """plan + commit + send."""
    mean: float
    """Of the total."""
    worst: float
    collections: int
    """Garbage collections in 100 steps, of all generations."""


class AnyText:
    """A grammar, and where one is in it: nothing is forbidden, and no token ends a text."""

    end_token_ids: frozenset[int] = frozenset()

    def matcher(self, grammar: str) -> AnyText:
        return self

    def advance(self, token_ids: Sequence[int]) -> None:
        pass

    def forced(self) -> Sequence[int]:
        return ()

    def masks(self, matchers: Sequence[Matcher]) -> tuple[bytearray, tuple[str | None, ...]]:
        size_bytes = 4 * -(-VOCAB_SIZE // 32)
        return bytearray(b"\xff") * size_bytes * len(matchers), (None,) * len(matchers)


class Crowd:
    """Sequences of `context` tokens that all decode, without end."""

    def __init__(self, rows: int, context: int, *, num_steps: int, constrained: bool = False) -> None:
        self.rows, self.context = rows, context
        draw = random.Random(rows * context)
        self._tokens = [draw.randrange(3, VOCAB_SIZE - 1) for _ in range(rows)]
        length = context + num_steps + 2 * PAGE_SIZE
        info = RunnerInfo(
            vocab_size=VOCAB_SIZE,
            max_model_len=length + 1,
            num_pages=1 + rows * (2 + length // PAGE_SIZE),
            cache=CacheSpec(layers=(LayerSpec(Layout.PAGES),), page_size=PAGE_SIZE, page_bytes=4 * PAGE_SIZE),
            backend="fake",
            device="none",
            dtype="none",
            chunked_decode=True,
        )
        config = Config(max_num_seqs=rows, prefill_step_size=rows * length)
        self.constraints = Constraints(lambda _: AnyText(), vocab_size=VOCAB_SIZE)
        self.scheduler = Scheduler(info, config, constraints=self.constraints)
        grammar = "any" if constrained else None
        for number in range(rows):
            # lengths differ a little, so that not all rows fill a page in the same step
            prompt = tuple(draw.choices(range(3, VOCAB_SIZE - 1), k=context + number % PAGE_SIZE))
            sampling = SamplingParams(
                seed=1, temperature=0.0, ignore_eos=True, stop_token_ids=(STOP_TOKEN_ID,), grammar=grammar
            )
            self.scheduler.submit(Submit(f"request-{number:08d}", Prompt(prompt), sampling))
        self._in_flight = self._first_step()
        assert len(self._in_flight.sampled_slots) == rows, "the prompts take more than one step"
        prefilled = self.result()
        self.launched(self.plan())
        self.scheduler.commit(prefilled)
        self.scheduler.take_outputs()

    def _first_step(self) -> Step:
        """The prompts', once all grammars are built; and the masks behind it, once."""
        while self.scheduler.waits_for_threads:
            time.sleep(0.001)
        step = self.plan()
        launched = self.scheduler.newest
        if launched is not None and launched.constrained:
            with self.constraints:
                self.constraints.prepare(launched.step.constrained, launched.constrained)
                self.constraints.masks()
        return step

    def plan(self) -> Step:
        """The next step. The one in flight is to be committed; then call `launched`."""
        step = self.scheduler.plan()
        assert step is not None
        return step

    def result(self) -> StepResult:
        """What a runner would answer to the step in flight."""
        step = self._in_flight
        return StepResult(number=step.number, token_ids=tuple(self._tokens), elapsed_s=0.005)

    def launched(self, step: Step) -> None:
        """This step is the one in flight now."""
        self._in_flight = step


def measure(crowd: Crowd, *, num_steps: int, inputs: Inputs | None) -> Measured:
    """Run so many steps and take their times."""
    encode = msgspec.msgpack.Encoder().encode
    times: list[tuple[float, float, float, float]] = []
    gc.collect()
    gc.freeze()
    collections = num_collections()
    for _ in range(num_steps):
        result = crowd.result()
        begun = time.perf_counter()
        step = crowd.plan()
        planned = time.perf_counter()
        if inputs is not None:
            inputs(step.decodes)
        launched = time.perf_counter()
        crowd.scheduler.commit(result)
        committed = time.perf_counter()
        encode(Outputs(crowd.scheduler.take_outputs()))
        sent = time.perf_counter()
        crowd.launched(step)
        times.append((planned - begun, committed - launched, sent - committed, launched - planned))
    collections = num_collections() - collections
    gc.unfreeze()
    totals = [plan + commit + send for plan, commit, send, _ in times]
    plan_s, commit_s, send_s, inputs_s = (statistics.median(column) for column in zip(*times, strict=True))
    return Measured(
        rows=crowd.rows,
        context=crowd.context,
        plan=plan_s * 1e6,
        commit=commit_s * 1e6,
        send=send_s * 1e6,
        inputs=None if inputs is None else inputs_s * 1e6,
        total=statistics.median(totals) * 1e6,
        mean=statistics.mean(totals) * 1e6,
        worst=max(totals) * 1e6,
        collections=round(collections * 100 / num_steps),
    )


def num_collections() -> int:
    """Garbage collections of this process so far."""
    return sum(generation["collections"] for generation in gc.get_stats())


def load_inputs(name: str | None) -> Inputs | None:
    """The callable that `module:name` means."""
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    found: Inputs = getattr(importlib.import_module(module), attribute)
    return found


def numbers(text: str) -> list[int]:
    """`1,8,64`"""
    return [int(part) for part in text.split(",")]


def print_table(lines: Sequence[Measured]) -> None:
    """Plain text."""
    print(" rows context |   plan commit   send  inputs |  total   mean  worst | gc/100 steps")
    for m in lines:
        given = "      -" if m.inputs is None else f"{m.inputs:7.0f}"
        times = f"{m.plan:6.0f} {m.commit:6.0f} {m.send:6.0f} {given}"
        print(f"{m.rows:5} {m.context:7} | {times} | {m.total:6.0f} {m.mean:6.0f} {m.worst:6.0f} | {m.collections:6}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=numbers, default=[1, 8, 64, 256])
    parser.add_argument("--contexts", type=numbers, default=[256, 4096, 32768])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inputs", metavar="MODULE:NAME")
    parser.add_argument("--constrained", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    inputs = load_inputs(given.inputs)
    lines = []
    for rows in given.rows:
        num_steps, constrained = given.rounds * given.steps, given.constrained
        crowds = [Crowd(rows, context, num_steps=num_steps, constrained=constrained) for context in given.contexts]
        rounds = [[measure(c, num_steps=given.steps, inputs=inputs) for c in crowds] for _ in range(given.rounds)]
        lines += [min(found, key=lambda m: m.total) for found in zip(*rounds, strict=True)]
        print(f"{rows} rows: {[round(line.total) for line in lines[-len(crowds) :]]} us", file=sys.stderr)
    print_table(lines)
    if given.output:
        given.output.write_text(json.dumps([asdict(line) for line in lines], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
