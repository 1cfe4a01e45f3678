"""Does lm-eval get from a running server the log-likelihoods that mlx-lm itself computes?

    vllm-mlx serve demo
    python benchmarks/lm_harness/compare.py --harness PATH/OF/lm_eval
        [--base-url http://127.0.0.1:8000] [--model demo] [--dtype float32] [--limit 1e-3]

`--harness` is the command of lm-eval (`pip install "lm-eval[api]" transformers` in an environment of its own). It runs
the task of this folder with its model `local-completions`, unchanged and without a network. Then mlx-lm computes the
same continuations in one pass each. `--dtype` says what numbers it computes with: float32, as the server does on a CPU.
Ends with 1 if a log-likelihood differs by more than the limit.

On Linux run it with a fast BLAS: eval "$(python -m vllm_mlx.runner.blas)"
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx.utils import tree_map
from mlx_lm import load

from vllm_mlx.core.config import Config
from vllm_mlx.models.resolve import resolve

FOLDER = Path(__file__).resolve().parent
TASK = "common_sense"


class Found(msgspec.Struct, frozen=True):
    """What the server said of one continuation."""

    context: str
    continuation: str
    loglikelihood: float


def ask_server(harness: str, base_url: str, *, model: str, tokenizer: Path) -> list[Found]:
    """Run lm-eval; returns what it got. Raises CalledProcessError if it fails."""
    url = f"{base_url}/v1/completions"
    with tempfile.TemporaryDirectory() as folder:
        options = f"model={model},base_url={url},tokenizer={tokenizer},num_concurrent=4"
        command = [harness, "--model", "local-completions", "--model_args", options, "--tasks", TASK]
        command += ["--include_path", str(FOLDER), "--log_samples", "--output_path", folder]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": f"{folder}/cache"}
        subprocess.run(command, check=True, cwd=FOLDER, env={**os.environ, **offline})
        [path] = Path(folder).rglob(f"samples_{TASK}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [found for sample in samples for found in read_sample(sample)]


def read_sample(sample: dict[str, Any]) -> list[Found]:
    """The continuations of one line of lm-eval's log."""
    asked = [(one["arg_0"], one["arg_1"]) for one in sample["arguments"].values()]
    answers = [float(resp[0][0]) for resp in sample["resps"]]
    return [Found(*pair, answer) for pair, answer in zip(asked, answers, strict=True)]


def loglikelihood(model: nn.Module, tokenizer: Any, context: str, continuation: str) -> float:
    """Of the continuation's tokens given the context; the two are cut apart as lm-eval does."""
    both = tokenizer.encode(context + continuation)
    num_context = len(tokenizer.encode(context))
    logits = model(mx.array([both[:-1]]))[0].astype(mx.float32)
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(scores, mx.array(both[1:])[:, None], axis=-1)[:, 0]
    return float(chosen[num_context - 1 :].sum())


def load_model(path: Path, dtype: str | None) -> tuple[nn.Module, Any]:
    """mlx-lm's own model and tokenizer."""
    model, tokenizer = load(str(path))[:2]
    if dtype is not None:
        wanted = getattr(mx, dtype)

        def cast(array: mx.array) -> mx.array:
            return array.astype(wanted) if mx.issubdtype(array.dtype, mx.floating) else array

        model.update(tree_map(cast, model.parameters()))
    return model, tokenizer


def _quietly(text: str, fraction: float | None = None) -> None:
    """Progress of no interest."""


def main() -> int:
    """Compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--harness", required=True)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype")
    parser.add_argument("--limit", type=float, default=1e-3)
    args = parser.parse_args()
    path = resolve(Config(model=args.model), progress=_quietly).path
    found = ask_server(args.harness, args.base_url, model=args.model, tokenizer=path)
    model, tokenizer = load_model(path, args.dtype)
    own = [loglikelihood(model, tokenizer, one.context, one.continuation) for one in found]
    away = [abs(one.loglikelihood - value) for one, value in zip(found, own, strict=True)]
    for one, value in zip(found, own, strict=True):
        print(f"{one.loglikelihood:12.6f} {value:12.6f}  {one.context[-30:]!r} {one.continuation!r}")
    print(f"{len(found)} continuations; largest difference {max(away):.2e}, limit {args.limit:g}")
    return 0 if found and max(away) <= args.limit else 1


if __name__ == "__main__":
    sys.exit(main())
