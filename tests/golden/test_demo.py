"""The demo model through a real engine process gives the tokens that mlx-lm's own loop gives."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.cli.compose import open_engine
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineClient, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.runner import blas

NUM_TOKENS = 12
PROMPTS = (
    "1, 2, 3, 4, 5, 6,",
    "The capital of France is",
    "The opposite of hot is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils at 100 degrees",
    "The days of the week are Monday, Tuesday,",
    "A recipe for pancakes needs flour, milk,",
    "Roses are red, violets are",
    "She opened the old book and read the first line aloud: " * 6,
)
LIBRARY_SCRIPT = """
import json, sys
import mlx.core as mx
mx.disable_compile()
from pathlib import Path
from mlx_lm.generate import generate_step
from mlx_lm.utils import dequantize_model, load_model

folder, prompts, num_tokens = json.loads(sys.stdin.read())
model, _ = load_model(Path(folder), lazy=True)
model = dequantize_model(model)
model.set_dtype(mx.float32)
print(json.dumps([[int(t) for t, _ in generate_step(mx.array(p), model, max_tokens=num_tokens)] for p in prompts]))
"""


async def library_tokens(folder: Path, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What `generate_step` gives, in a process of its own with the same BLAS and precision."""
    import os
    import sys

    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        LIBRARY_SCRIPT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | blas.preload_environment(),
    )
    found, _ = await process.communicate(json.dumps([str(folder), prompts, NUM_TOKENS]).encode())
    return [tuple(tokens) for tokens in json.loads(found)]


async def engine_tokens(engine: EngineClient, name: str, prompt: tuple[int, ...], **sampling: Any) -> tuple[int, ...]:
    """Greedy tokens of one prompt."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_TOKENS, "seed": 0, **sampling})
    tokens: tuple[int, ...] = ()
    async for output in engine.generate(Submit(name, Prompt(prompt), params)):
        tokens += output.token_ids
    return tokens


@pytest.mark.anyio
async def test_tokens_equal_mlx_lm_alone_and_in_a_changing_batch(demo_model: Path) -> None:
    tokenizer = Tokenizer.load(demo_model)
    prompts = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in PROMPTS]
    expected = await library_tokens(demo_model, prompts)
    engine = open_engine(Config(model="demo", max_num_seqs=8, prefill_step_size=64), demo_model)
    await engine.start()
    try:
        alone = [await engine_tokens(engine, f"alone-{i}", prompt) for i, prompt in enumerate(prompts)]
        assert alone == expected

        async def late(i: int, prompt: tuple[int, ...]) -> tuple[int, ...]:
            """Joins after others have begun, and leaves after a length of its own."""
            await asyncio.sleep(0.15 * i)
            return await engine_tokens(engine, f"batch-{i}", prompt, max_tokens=NUM_TOKENS - i % 4)

        together = await asyncio.gather(*(late(i, prompt) for i, prompt in enumerate(prompts)))
        assert list(together) == [tokens[: NUM_TOKENS - i % 4] for i, tokens in enumerate(expected)]
    finally:
        await engine.stop()
