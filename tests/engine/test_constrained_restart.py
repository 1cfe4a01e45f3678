"""An engine process that is killed while constrained sequences run: they go on where they were in their grammars."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path

import jsonschema
import pytest
from fixtures_text import EOS_ID, write_tokenizer

from vllm_mlx.chat.constrain import Constrainer
from vllm_mlx.chat.tokenizer import Tokenizer
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import FinishReason, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.shape import OutputShape
from vllm_mlx.engine.process import ProcessEngine

CHILD = Path(__file__).with_name("fake_child.py")
VOCAB_SIZE = 640
TIMEOUT_S = 60.0
ROW = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": 10, "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["id", "ok"],
        "additionalProperties": False,
    },
    "minItems": 3,
    "maxItems": 3,
}
WORDS = "(fox |dog |river ){12}"


class Asked:
    """Requests to one engine, read side by side; some of them constrained."""

    def __init__(self, engine: ProcessEngine, submits: list[Submit]) -> None:
        self._streams = [engine.generate(submit) for submit in submits]
        self.tokens: list[list[int]] = [[] for _ in submits]
        self.ends: list[FinishReason | None] = [None] * len(submits)

    async def read(self, count: int = 1_000_000) -> None:
        """So many tokens more of each, or all that come."""

        async def read_one(index: int) -> None:
            end = len(self.tokens[index]) + count
            while self.ends[index] is None and len(self.tokens[index]) < end:
                output = await anext(self._streams[index])
                self.tokens[index] += output.token_ids
                self.ends[index] = output.finish

        await asyncio.gather(*(read_one(index) for index in range(len(self._streams))))


async def submits(tokenizer: Tokenizer, tag: str) -> list[Submit]:
    constrainer = Constrainer(tokenizer)
    schema = await constrainer.grammar(OutputShape("json_schema", ROW, "schema"), vocab_size=VOCAB_SIZE)
    words = await constrainer.grammar(OutputShape("regex", WORDS, "regex"), vocab_size=VOCAB_SIZE)
    fox = tokenizer.encode("fox", add_special_tokens=False)
    common = SamplingParams(seed=5, temperature=0.8, max_tokens=200, stop_token_ids=(EOS_ID,))
    wanted = [
        common.replace(grammar=schema, logprobs=1),
        common.replace(grammar=words, bad_word_ids=(fox,), presence_penalty=1.0),
        common.replace(allowed_token_ids=(7, 8, 9), bad_word_ids=((7, 7), (8, 7, 8)), max_tokens=60),
        common.replace(max_tokens=60, ignore_eos=True, stop_token_ids=()),
    ]
    return [Submit(f"{tag}{i}", Prompt((i + 3, 4, 5)), sampling) for i, sampling in enumerate(wanted)]


@pytest.mark.anyio
async def test_killed_engine_changes_no_token_of_constrained_requests(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    options = {"step_s": 0.004, "vocab_size": VOCAB_SIZE}
    env = {"FAKE_ENGINE": json.dumps({"options": options, "tokenizer": str(tmp_path)})}
    async with asyncio.timeout(TIMEOUT_S):
        engine = ProcessEngine([sys.executable, str(CHILD)], config=Config(), env=env)
        try:
            await engine.start()
            undisturbed = Asked(engine, await submits(tokenizer, "a"))
            await undisturbed.read()
            asked = Asked(engine, await submits(tokenizer, "b"))
            for _ in range(2):
                await asked.read(6)
                assert engine.pid
                os.kill(engine.pid, signal.SIGKILL)
            await asked.read()
        finally:
            await engine.stop()
    assert asked.tokens == undisturbed.tokens
    assert asked.ends == undisturbed.ends == [FinishReason.STOP] * 2 + [FinishReason.LENGTH] * 2
    jsonschema.validate(json.loads(tokenizer.decode(asked.tokens[0])), ROW)
    assert re.fullmatch(WORDS, tokenizer.decode(asked.tokens[1]))
    assert set(asked.tokens[2]) <= {7, 8, 9}
    assert engine.status().num_restarts == 2
