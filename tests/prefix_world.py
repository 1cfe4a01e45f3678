"""A scheduler, a runner without a model and a disk, driven round by round: who shares which prefix can be watched."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from turns import Turns, Watched

from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import Output, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.constraints import Constraints
from vllm_mlx.engine.rounds import Rounds
from vllm_mlx.kv.disk import DiskCache, open_disk
from vllm_mlx.testing.fake import FakeRunner

PAGE = 4
VOCAB_SIZE = 7


KINDS: dict[str, dict[str, Any]] = {
    "pages": {},
    "rows": {"num_pages": 0},
    "state": {"num_pages": 0, "state": Layout.STATE},
    "pages and state": {"state": Layout.STATE},
    "pages and rows": {"state": Layout.ROWS},
    "windows": {"windows": (None, 6, 6, 11)},
    "windows only": {"windows": (5,)},
    "windows and state": {"windows": (None, 6), "state": Layout.STATE},
    "windows and rows": {"windows": (3, None), "state": Layout.ROWS},
}
"""Of models, by what they keep."""
PAGES_ONLY = ("pages", "windows", "windows only")
"""Those that keep nothing outside pages."""


class World:
    """The engine's rounds on the calling thread; counts the tokens that are computed.

    `collects_first` says in turns whether the tokens of the step in flight are taken in before the step that was built
    behind it is started.
    """

    def __init__(
        self,
        kind: str = "pages",
        *,
        num_pages: int = 64,
        checkpoint_bytes: int = 1 << 20,
        disk: Path | None = None,
        collects_first: Sequence[bool] = (False,),
        plans_ahead: bool = False,
        **given: Any,
    ) -> None:
        num_pages *= 2 if len(KINDS[kind].get("windows", ())) > 1 else 1  # each is of one group of layers only
        options: dict[str, Any] = {"num_pages": num_pages, "checkpoint_bytes": checkpoint_bytes, **KINDS[kind]}
        self.runner = FakeRunner(
            page_size=PAGE, vocab_size=VOCAB_SIZE, max_model_len=64, fingerprint=b"fingerprint-of-x", **options
        )
        stored: dict[str, Any] = {"ssd_cache_dir": str(disk), "ssd_cache_min_free_gb": 0} if disk else {}
        config = Config(**{"prefill_step_size": 8, **stored, **given})
        self.disk: DiskCache | None = open_disk(config, self.runner.info)
        constraints = Constraints(None, vocab_size=VOCAB_SIZE)
        self.scheduler = Watched(self.runner.info, config, disk=self.disk, constraints=constraints, clock=lambda: 0.0)
        self.scheduler.plans_ahead = plans_ahead
        self.rounds = Rounds(self.scheduler, self.runner, constraints, tell=self._tell, overlap=Turns(collects_first))
        self.outputs: dict[str, list[Output]] = {}

    @property
    def num_prefilled(self) -> int:
        """Prompt tokens that were computed."""
        return sum(len(row.token_ids) for step in self.scheduler.steps for row in step.prefills)

    def round(self, *, late_abort: str = "") -> None:
        """`late_abort` is nobody's wish any more once the step is planned."""
        self.scheduler.late_aborts = [late_abort]
        self.rounds.round()
        self._tell()

    def _tell(self) -> None:
        for output in self.scheduler.take_outputs():
            self.outputs.setdefault(output.request_id, []).append(output)

    def run(self, *submits: Submit) -> None:
        for one in submits:
            self.scheduler.submit(one)
        while self.scheduler.has_work or self.rounds.has_in_flight:
            if self.scheduler.waits_for_threads:
                time.sleep(0.001)
            self.round()

    def close(self) -> None:
        """What is worth keeping is on disk afterwards."""
        if self.disk is not None:
            self.disk.close()

    def tokens(self, name: str) -> tuple[int, ...]:
        return tuple(token for output in self.outputs[name] for token in output.token_ids)

    def num_cached(self, name: str) -> int:
        return self.outputs[name][0].num_cached

    def history(self, name: str, prompt: Any) -> list[int]:
        """A prompt and its answer."""
        return [*(token % VOCAB_SIZE for token in prompt), *self.tokens(name)]


@contextmanager
def opened(*given: Any, **settings: Any) -> Iterator[World]:
    world = World(*given, **settings)
    try:
        yield world
    finally:
        world.close()


def submit(name: str, token_ids: Any, *, max_tokens: int = 6, salt: bytes = b"", seed: int = 1, **given: Any) -> Submit:
    sampling = SamplingParams(temperature=0.8, seed=seed, max_tokens=max_tokens)
    return Submit(name, Prompt(tuple(token % VOCAB_SIZE for token in token_ids), salt), sampling, **given)
