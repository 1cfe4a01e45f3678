"""The demo model answers schemas of every kind, at rest and at random: whatever it finishes is valid."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from schema_corpus import Case, cases, check

from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.cli.compose import open_engine
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineClient, FinishReason, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.shape import OutputShape

CASES = [case for case in cases() if case.refused is None]
MAX_TOKENS = 96
NUM_ROWS = 18
"""All but two of them constrained."""


class Asking:
    """Asks one engine for answers, of schemas and free ones."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, *, vocab_size: int) -> None:
        self._engine, self._tokenizer, self._vocab_size = engine, tokenizer, vocab_size
        self._constrainer = Constrainer(tokenizer)

    async def answer(self, case: Case, *, temperature: float) -> str | None:
        """An answer to its schema; None if it did not end in time."""
        shape = OutputShape("json_schema", case.schema, "schema", is_strict=True)
        grammar = await self._constrainer.grammar(shape, vocab_size=self._vocab_size)
        stops = tuple(sorted(self._tokenizer.eos_token_ids))
        sampling = SamplingParams(
            temperature=temperature, seed=3, max_tokens=MAX_TOKENS, stop_token_ids=stops, grammar=grammar
        )
        return await self._ask(f"{case.name}-{temperature}", f"An example of {json.dumps(case.schema)}: ", sampling)

    async def talk(self) -> None:
        """Free text, without an end."""
        for number in range(1000):
            await self._ask(f"free {number}", "Once upon a time", SamplingParams(seed=number, max_tokens=200))

    async def _ask(self, name: str, text: str, sampling: SamplingParams) -> str | None:
        tokens: tuple[int, ...] = ()
        prompt = Prompt(self._tokenizer.encode(text, add_special_tokens=False)[:48])
        async for output in self._engine.generate(Submit(name, prompt, sampling)):
            tokens += output.token_ids
            assert output.finish is not FinishReason.ERROR, output.message
        return self._tokenizer.decode(tokens) if output.finish is FinishReason.STOP else None


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_every_finished_answer_is_valid(demo_model: Path, temperature: float) -> None:
    tokenizer = Tokenizer.load(demo_model)
    engine = open_engine(Config(model="demo", max_num_seqs=NUM_ROWS), demo_model)
    try:
        info = await engine.start()
        asking = Asking(engine, tokenizer, vocab_size=info.vocab_size)
        others = [asyncio.create_task(asking.talk()) for _ in range(2)]
        answers = await asyncio.gather(*(asking.answer(case, temperature=temperature) for case in CASES))
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    finally:
        await engine.stop()
    found = {case.name: text for case, text in zip(CASES, answers, strict=True) if text is not None}
    print(f"temperature {temperature}: {len(found)} of {len(CASES)} ended within {MAX_TOKENS} tokens")
    for case in CASES:
        if case.name in found:
            check(case, found[case.name])
    assert len(found) >= 0.6 * len(CASES), sorted({case.name for case in CASES} - set(found))
