"""How long an imaginary device waits for the engine: `python benchmarks/device_gap.py [--rows 64] [--step-ms 3]`.

The engine's loop, its scheduler and its clients are real. The device computes one step after the other, each in
`--step-ms`; launching a step takes the host `--launch-ms`. A gap is the time between the end of a step and the arrival
of the next one; without gaps the device is never idle. Compared: the bare loop (nobody reads the outputs), an engine on
a thread of this process, and one in a child process, both with a reader per sequence on an event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_mlx.core.cachespec import CacheSpec, LayerSpec, Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineClient, FromEngine, Shutdown, Submit, ToEngine
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import MemoryUse, ProgressCallback, RunnerInfo, Step, StepResult
from vllm_mlx.engine.engine import Engine
from vllm_mlx.engine.thread import ThreadEngine

CONTEXT = 1024
MAX_TOKENS = 600
SETTLED = 100
"""Steps left out at the start."""


class Times(NamedTuple):
    """A step's launch: begun, handed to the device, and when the device was done with the step before."""

    begun: float
    launched: float
    device_free: float


@dataclass
class Timed:
    """A step, when it was begun, and when it is done."""

    step: Step
    begun: float
    ready_at: float = 0.0


class TimedRunner:
    """A `Runner` whose device only takes time. Tokens mean nothing."""

    def __init__(self, *, step_s: float, launch_s: float) -> None:
        self._step_s = step_s
        self._launch_s = launch_s
        self._ready_at = 0.0
        self.times: list[Times] = []
        self.info = RunnerInfo(
            vocab_size=50_000,
            max_model_len=32_768,
            num_pages=100_000,
            cache=CacheSpec(layers=(LayerSpec(Layout.PAGES),), page_size=32, page_bytes=128),
            backend="fake",
            device="none",
            dtype="none",
        )

    def build(self, step: Step) -> Timed:
        begun = time.perf_counter()
        while time.perf_counter() < begun + self._launch_s:
            pass
        return Timed(step, begun)

    def start(self, handle: Timed) -> None:
        now, step = time.perf_counter(), handle.step
        if len(step.decodes) and not step.prefills:
            self.times.append(Times(handle.begun, now, self._ready_at))
        handle.ready_at = self._ready_at = max(now, self._ready_at) + self._step_s

    def collect(self, handle: Timed) -> StepResult:
        time.sleep(max(0.0, handle.ready_at - time.perf_counter()))
        token_ids = tuple(range(1000, 1000 + len(handle.step.sampled_slots)))
        return StepResult(handle.step.number, token_ids, elapsed_s=self._step_s)

    def memory(self) -> MemoryUse:
        return MemoryUse()

    def idle(self) -> None:
        """Nothing to drop."""

    def close(self) -> None:
        """Say how it went."""
        gaps = [1e6 * max(0.0, t.launched - t.device_free) for t in self.times[SETTLED:]]
        slack = [1e6 * (t.device_free - t.launched) for t in self.times[SETTLED:]]
        idle = 100 * sum(gaps) / (1e6 * (self.times[-1].launched - self.times[SETTLED].launched))
        print(
            f"   device idle {idle:5.2f} %   steps with a gap {sum(gap > 0 for gap in gaps):4} of {len(gaps)}   "
            f"gap p99 {sorted(gaps)[int(0.99 * len(gaps))]:6.0f} us   "
            f"launched {statistics.median(slack):5.0f} us before it is needed",
            file=sys.stderr,
            flush=True,
        )


class TimedFactory:
    """Makes the runner on the engine's thread."""

    def __init__(self, step_ms: float, launch_ms: float) -> None:
        self._given = {"step_s": step_ms / 1000, "launch_s": launch_ms / 1000}

    def __call__(self, progress: ProgressCallback) -> TimedRunner:
        return TimedRunner(**self._given)


class ScriptedInbox:
    """All sequences at once; the end when the engine has nothing to do any more."""

    def __init__(self, submits: list[Submit]) -> None:
        self._messages: list[ToEngine] = [*submits]

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        messages, self._messages = self._messages, []
        return messages if messages or timeout_s == 0 else [Shutdown()]


class NoOutbox:
    """Nobody reads."""

    def send(self, message: FromEngine) -> None:
        """Forget it."""


def submits(rows: int) -> list[Submit]:
    """So many sequences that begin and end together."""
    sampling = SamplingParams(seed=1, ignore_eos=True, max_tokens=MAX_TOKENS)
    return [Submit(f"request-{i}", Prompt((7,) * CONTEXT), sampling) for i in range(rows)]


async def serve(client: EngineClient, rows: int, *, work_us: float) -> None:
    """One reader per sequence, who does some work for every output, as a detokeniser would."""

    async def read(submit: Submit) -> None:
        async with contextlib.aclosing(client.generate(submit)) as outputs:
            async for _ in outputs:
                until = time.perf_counter() + work_us / 1e6
                while time.perf_counter() < until:
                    pass

    await client.start()
    await asyncio.gather(*map(read, submits(rows)))
    await client.stop()


def run_child() -> None:
    """The engine process: `device_gap.py --child STEP_MS LAUNCH_MS FOLDER`."""
    from vllm_mlx.engine.child import run_child

    step_ms, launch_ms, folder = sys.argv[2:]
    raise SystemExit(run_child(folder, factory=TimedFactory(float(step_ms), float(launch_ms)), config=config()))


def config() -> Config:
    return Config(max_num_seqs=256, prefill_step_size=1 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=3.0)
    parser.add_argument("--launch-ms", type=float, default=1.0)
    parser.add_argument("--work-us", type=float, default=15.0, help="of the reader, per output")
    given = parser.parse_args()
    factory: Any = TimedFactory(given.step_ms, given.launch_ms)
    print("bare loop", file=sys.stderr)
    Engine(factory, config(), inbox=ScriptedInbox(submits(given.rows)), outbox=NoOutbox()).run()
    print("thread", file=sys.stderr)

    async def on_thread() -> None:
        await serve(ThreadEngine(factory, config()), given.rows, work_us=given.work_us)

    asyncio.run(on_thread())
    print("process", file=sys.stderr)

    async def in_process() -> None:
        from vllm_mlx.engine.process import ProcessEngine

        command = (sys.executable, str(Path(__file__)), "--child", str(given.step_ms), str(given.launch_ms))
        await serve(ProcessEngine(command, config=config()), given.rows, work_us=given.work_us)

    asyncio.run(in_process())


if __name__ == "__main__":
    run_child() if sys.argv[1:2] == ["--child"] else main()
