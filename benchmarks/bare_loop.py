"""Decode without a server: `python benchmarks/bare_loop.py {runner,mlx_lm} FOLDER`.

Reads a number of tokens per line from standard input and answers with the seconds that each took, the prompt's
computation left out. Used by compare_servers.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from vllm_mlx.core.config import Config
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import DecodeRow, NewSequence, PrefillRow, Step
from vllm_mlx.runner.load import create_runner_factory, untouched_file_limit

PROMPT = tuple(range(1000, 1040))


def our_runner(folder: Path) -> Callable[[int], float]:
    """Steps for one sequence, straight to the runner."""
    runner = create_runner_factory(folder, Config(model=str(folder)))(lambda *_: None)
    page_size = runner.info.cache.page_size

    def decode(num_tokens: int) -> float:
        pages = tuple(range(1, 2 + (len(PROMPT) + num_tokens) // page_size))
        new = NewSequence(0, SamplingParams(temperature=0.0, seed=0), PROMPT, len(PROMPT))
        prefill = PrefillRow(0, 0, PROMPT, pages, samples=True)
        runner.collect(runner.launch(Step(0, new=(new,), prefills=(prefill,))))
        begun = time.perf_counter()
        for i in range(num_tokens - 1):
            row = DecodeRow(0, len(PROMPT) + i, pages)
            runner.collect(runner.launch(Step(i + 1, decodes=(row,))))
        elapsed = time.perf_counter() - begun
        runner.launch(Step(num_tokens, released=(0,)))
        return elapsed / (num_tokens - 1)

    return decode


def library_loop(folder: Path) -> Callable[[int], float]:
    """mlx-lm's `generate_step`."""
    with untouched_file_limit():
        import mlx.core as mx
        from mlx_lm.generate import generate_step
        from mlx_lm.utils import load_model
    model, _ = load_model(folder)

    def decode(num_tokens: int) -> float:
        steps = generate_step(mx.array(PROMPT), model, max_tokens=num_tokens)
        next(steps)
        begun = time.perf_counter()
        for _ in steps:
            pass
        return (time.perf_counter() - begun) / (num_tokens - 1)

    return decode


def main() -> None:
    decode = {"runner": our_runner, "mlx_lm": library_loop}[sys.argv[1]](Path(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        print(decode(int(line)), flush=True)


if __name__ == "__main__":
    main()
