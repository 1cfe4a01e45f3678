"""The demo model answers schemas of many kinds, at rest and at random: whatever it finishes is valid."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.cli.compose import open_engine
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineClient, FinishReason, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.shape import OutputShape

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["v"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "boolean"},
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"enum": ["red", "green", 7, None]},
    {"const": {"a": [1, 2]}},
    {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "minItems": 1, "maxItems": 3},
    {"oneOf": [{"type": "string", "maxLength": 5}, {"type": "boolean"}]},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 8}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    },
    TREE,
)
MAX_TOKENS = 40


async def answers(engine: EngineClient, tokenizer: Tokenizer, temperature: float, vocab_size: int) -> list[str | None]:
    """One text for each schema, None where it did not end in time; free rows run beside them."""
    constrainer = Constrainer(tokenizer)

    async def answer(name: str, schema: dict[str, Any] | None) -> str | None:
        text = "Write an example." if schema is None else f"Write an example of {json.dumps(schema)} in JSON: "
        grammar = None
        if schema is not None:
            grammar = await constrainer.grammar(OutputShape("json_schema", schema), vocab_size=vocab_size)
        stops = tuple(sorted(tokenizer.eos_token_ids))
        sampling = SamplingParams(
            temperature=temperature, seed=3, max_tokens=MAX_TOKENS, stop_token_ids=stops, grammar=grammar
        )
        tokens: tuple[int, ...] = ()
        prompt = Prompt(tokenizer.encode(text, add_special_tokens=False)[:48])
        async for output in engine.generate(Submit(f"{name}-{temperature}", prompt, sampling)):
            tokens += output.token_ids
            assert output.finish is not FinishReason.ERROR, output.message
        return tokenizer.decode(tokens) if output.finish is FinishReason.STOP else None

    wanted = [*SCHEMAS, None, None]
    found = await asyncio.gather(*(answer(str(i), schema) for i, schema in enumerate(wanted)))
    return found[: len(SCHEMAS)]


@pytest.mark.slow
@pytest.mark.anyio
async def test_every_finished_answer_is_valid(demo_model: Path) -> None:
    tokenizer = Tokenizer.load(demo_model)
    engine = open_engine(Config(model="demo", max_num_seqs=12), demo_model)
    try:
        info = await engine.start()
        for temperature in (0.0, 1.5):
            found = await answers(engine, tokenizer, temperature, info.vocab_size)
            for schema, text in zip(SCHEMAS, found, strict=True):
                if text is not None:
                    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
            assert sum(text is not None for text in found) >= len(SCHEMAS) - 3, found
    finally:
        await engine.stop()
