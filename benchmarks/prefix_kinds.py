"""Time to the first token of a long prompt for every kind of layer, with small random models and no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import mlx.core as mx  # noqa: E402
from prefix_tables import Seconds, size_bytes, wait_written  # noqa: E402
from random_model import write  # noqa: E402
from tiny_models import config_of  # noqa: E402

from vllm_mlx.cli.compose import open_engine  # noqa: E402
from vllm_mlx.cli.settings import make_config  # noqa: E402
from vllm_mlx.core.errors import EngineFailure  # noqa: E402
from vllm_mlx.core.messages import EngineClient, FinishReason, Submit  # noqa: E402
from vllm_mlx.core.prompt import Prompt  # noqa: E402
from vllm_mlx.core.sampling import SamplingParams  # noqa: E402

LAYERS = 4
OTHER_END_TOKENS = 60
"""How much of the prompt is replaced when it gets another end: about a message."""
WARM_UP_TOKENS = 100
MAX_TOKENS = 4
WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 32768,
}
"""Wide enough that a prompt takes seconds: then what is measured are not the fixed costs of a request."""
EXPERTS = {"moe_intermediate_size": 512}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_next": {
        **EXPERTS,
        "shared_expert_intermediate_size": 512,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "mamba2": {"num_heads": 16, "state_size": 64},
    "gemma3_text": {"sliding_window": 512, "query_pre_attn_scalar": 64},
    "gpt_oss": {
        "sliding_window": 128,
        "intermediate_size": 512,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    },
    "deepseek_v3": {
        **EXPERTS,
        "num_key_value_heads": 8,
        "kv_lora_rank": 128,
        "q_lora_rank": 256,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    },
}
"""Model type -> what is wider than in the tests, besides `WIDE`."""


class KindsMeasurement:
    """Each kind round by round: an engine answers, is stopped, and starts again on the same folder."""

    def __init__(self, *, num_tokens: int, rounds: int, work: Path) -> None:
        self._num_tokens = num_tokens
        self._rounds = rounds
        self._work = work
        self.seconds: dict[str, Seconds] = {}
        self.tokens: dict[str, dict[str, Any]] = {}

    def run(self, kinds: list[str]) -> None:
        """Measure them one after the other."""
        for kind in kinds:
            folder = self._work / kind
            write(folder, {**config_of(kind), **WIDE, **KINDS[kind]}, dtype=mx.float32)
            for number in range(self._rounds):
                asyncio.run(self._round(kind, folder, number))

    async def _round(self, kind: str, folder: Path, number: int) -> None:
        draw = random.Random(f"{kind}-{number}")
        token_ids = tuple(draw.choices(range(WIDE["vocab_size"]), k=self._num_tokens))
        shared = len(token_ids) - OTHER_END_TOKENS
        other = token_ids[:shared] + tuple(draw.choices(range(WIDE["vocab_size"]), k=OTHER_END_TOKENS))
        with tempfile.TemporaryDirectory(dir=self._work) as disk:
            async with _engine(folder, Path(disk)) as engine:
                for case, asked in (("cold", token_ids), ("repeat", token_ids), ("other end", other)):
                    await self._time(kind, case, engine, asked, shared)
                wait_written(Path(disk))
            print(f"{kind}: {size_bytes(Path(disk)) / 1e6:.1f} MB on disk", file=sys.stderr, flush=True)
            async with _engine(folder, Path(disk)) as engine:
                await self._time(kind, "restart", engine, token_ids, shared)

    async def _time(self, kind: str, case: str, engine: EngineClient, asked: tuple[int, ...], shared: int) -> None:
        """`shared` is where the last message begins: servers ask for a state there."""
        ttft_s, num_cached = await _first_token(engine, asked, breakpoints=(shared,))
        self.seconds.setdefault(kind, {}).setdefault(case, []).append(ttft_s)
        self.tokens.setdefault(kind, {})[case] = (num_cached, len(asked))
        line = f"{kind}: {case}: {1000 * ttft_s:.0f} ms, {num_cached} of {len(asked)} cached"
        print(line, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def _engine(folder: Path, disk: Path) -> AsyncIterator[EngineClient]:
    """Started and warmed; in a process of its own, as a server's."""
    given = {"model": str(folder), "engine_start_attempts": 1, "ssd_cache_dir": str(disk), "cache_memory_mb": 4096}
    engine = open_engine(make_config(given, os.environ), folder)
    try:
        await engine.start()
        await _first_token(engine, tuple(range(WARM_UP_TOKENS)))
        yield engine
    finally:
        await engine.stop()


async def _first_token(
    engine: EngineClient, token_ids: tuple[int, ...], *, breakpoints: tuple[int, ...] = ()
) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens were cached. Raises EngineFailure."""
    sampling = SamplingParams(temperature=0.0, seed=0, ignore_eos=True, max_tokens=MAX_TOKENS)
    submit = Submit(f"{time.perf_counter_ns()}", Prompt(token_ids), sampling, breakpoints=breakpoints)
    begun, first, num_cached = time.perf_counter(), None, 0
    async with contextlib.aclosing(engine.generate(submit)) as outputs:
        async for output in outputs:
            if output.finish in (FinishReason.ERROR, FinishReason.REJECTED):
                raise EngineFailure(output.message or "The engine failed.")
            if output.token_ids and first is None:
                first, num_cached = time.perf_counter() - begun, output.num_cached
    if first is None:
        raise EngineFailure("No token came.")
    return first, num_cached
