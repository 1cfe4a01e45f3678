"""The compiled functions of a runner: warmed one by one, and done without if they fail."""

from __future__ import annotations

import mlx.core as mx

from vllm_mlx.core.errors import one_line
from vllm_mlx.core.log import get_logger
from vllm_mlx.runner.decode_step import DecodeStep
from vllm_mlx.runner.prefill_step import PrefillStep

log = get_logger("runner")
MAX_TOLD = 500
"""Characters of a compiler's own words."""


class CompiledSteps:
    """Those that there are; None stands for computing without."""

    def __init__(self, decode: DecodeStep | None = None, prefill: PrefillStep | None = None) -> None:
        self.decode = decode
        self.prefill = prefill

    @property
    def num_urgent(self) -> int:
        """Shapes that should be warmed before anybody is served."""
        num_prefill = self.prefill.num_cold if self.prefill is not None else 0
        return num_prefill + (self.decode.num_urgent if self.decode is not None else 0)

    def warm_one(self, last_tokens: mx.array) -> bool:
        """Compile the next shape, or plan it; False if none is left. What fails is not used any more.

        First those that are urgent, then those of long prompts, then the decode's others.
        """
        is_urgent = self._warm_prefill() or (self.num_urgent > 0 and self._warm_decode(last_tokens))
        return is_urgent or self._plan_prefill() or self._warm_decode(last_tokens)

    def close(self) -> None:
        """Drop them all, and what they hold."""
        for step in (self.decode, self.prefill):
            if step is not None:
                step.close()
        self.decode = self.prefill = None

    def _warm_prefill(self) -> bool:
        if self.prefill is None:
            return False
        try:
            return self.prefill.warm_one()
        except (RuntimeError, ValueError) as error:
            log.warning(f"short prompts are computed one by one (slower): {one_line(error)[:MAX_TOLD]}")
            self.prefill.close()
            self.prefill = None
            return True

    def _plan_prefill(self) -> bool:
        if self.prefill is None:
            return False
        try:
            return self.prefill.plan_one()
        except (RuntimeError, ValueError) as error:
            log.warning(f"long prompts are not planned in advance (slower at first): {one_line(error)[:MAX_TOLD]}")
            return True

    def _warm_decode(self, last_tokens: mx.array) -> bool:
        if self.decode is None:
            return False
        try:
            return self.decode.warm_one(last_tokens)
        except (RuntimeError, ValueError) as error:
            log.warning(f"decode steps are not compiled (slower): {one_line(error)[:MAX_TOLD]}")
            self.decode.close()
            self.decode = None
            return False
