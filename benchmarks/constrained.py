"""What holding every row of a batch to a grammar costs: tokens a second, constrained over free.

    eval "$(python -m vllm_mlx.runner.blas)"
    python benchmarks/constrained.py --model demo --rows 8 --tokens 64

Each round runs the same prompts twice, free and constrained, in turns; the ratio is that of the medians. The grammar
never ends and allows most tokens, so both kinds of rows compute the same number of steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time

from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.cli.compose import open_engine
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineClient, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.shape import OutputShape
from vllm_mlx.models.resolve import resolve

SCHEMA = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "size": {"type": "number"}, "tags": {"type": "array"}},
        "required": ["name", "size", "tags"],
    },
}


async def tokens_per_s(engine: EngineClient, *, rows: int, tokens: int, grammar: str | None, name: str) -> float:
    """Output tokens a second of one batch, from the moment all rows have their first token."""
    stamps: list[list[float]] = [[] for _ in range(rows)]

    async def run(row: int) -> None:
        sampling = SamplingParams(temperature=1.0, seed=row, max_tokens=tokens, grammar=grammar)
        async for output in engine.generate(Submit(f"{name}-{row}", Prompt(tuple(range(20, 52))), sampling)):
            stamps[row] += [time.perf_counter()] * len(output.token_ids)

    await asyncio.gather(*(run(row) for row in range(rows)))
    begin, end = max(each[0] for each in stamps), max(each[-1] for each in stamps)
    return sum(stamp > begin for each in stamps for stamp in each) / (end - begin)


async def measure(options: argparse.Namespace) -> dict[str, float]:
    config = Config(model=options.model, max_num_seqs=options.rows)
    path = resolve(config, progress=lambda *_: None).path
    engine = open_engine(config, path)
    try:
        info = await engine.start()
        grammar = await Constrainer(Tokenizer.load(path)).grammar(
            OutputShape("json_schema", SCHEMA), vocab_size=info.vocab_size
        )
        found: dict[str, list[float]] = {"free": [], "constrained": []}
        for round_ in range(options.rounds + 1):  # the first one warms up
            for kind, used in (("free", None), ("constrained", grammar)):
                name = f"{kind}-{round_}"
                value = await tokens_per_s(engine, rows=options.rows, tokens=options.tokens, grammar=used, name=name)
                print(f"{name}: {value:.1f} tokens/s", file=sys.stderr, flush=True)
                if round_:
                    found[kind].append(value)
    finally:
        await engine.stop()
    free, constrained = (statistics.median(found[kind]) for kind in ("free", "constrained"))
    return {"free_tokens_per_s": free, "constrained_tokens_per_s": constrained, "ratio": constrained / free}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
