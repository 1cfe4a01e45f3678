"""Log-probabilities of prompts equal those of mlx-lm's own forward pass over the whole prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.cli.compose import open_engine
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.runner import blas

TEXTS = (
    "The capital of France is Paris.",
    "She opened the old book and read the first line aloud: " * 8,
)
LIBRARY_SCRIPT = """
import json, sys
import mlx.core as mx
mx.disable_compile()
from pathlib import Path
from mlx_lm.utils import dequantize_model, load_model

folder, prompts = json.loads(sys.stdin.read())
model, _ = load_model(Path(folder), lazy=True)
model.set_dtype(mx.float32)
model = dequantize_model(model)
found = []
for prompt in prompts:
    logits = model(mx.array([prompt]))[0].astype(mx.float32)
    values = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    found.append([values[i, token].item() for i, token in enumerate(prompt[1:])])
print(json.dumps(found))
"""


def library_logprobs(folder: Path, prompts: list[tuple[int, ...]]) -> list[list[float]]:
    order = json.dumps([str(folder), prompts])
    environment = os.environ | blas.preload_environment()
    command = [sys.executable, "-c", LIBRARY_SCRIPT]
    done = subprocess.run(command, input=order, capture_output=True, text=True, check=True, env=environment)
    found: list[list[float]] = json.loads(done.stdout)
    return found


@pytest.mark.anyio
async def test_prompt_logprobs_equal_mlx_lm(demo_model: Path) -> None:
    tokenizer = Tokenizer.load(demo_model)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    prompts.append(prompts[1])
    expected = library_logprobs(demo_model, prompts)
    engine = open_engine(Config(model="demo", max_num_seqs=4, prefill_step_size=64), demo_model)
    await engine.start()
    try:
        for index, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=1, seed=0, prompt_logprobs=1)
            found: list[float] = []
            async for output in engine.generate(Submit(f"s{index}", Prompt(prompt), params)):
                if output.prompt_logprobs is not None:
                    assert output.prompt_logprobs.start == len(found) + 1
                    found += [each.logprob for each in output.prompt_logprobs.logprobs]
            assert found == pytest.approx(expected[index], abs=1e-3)
    finally:
        await engine.stop()
