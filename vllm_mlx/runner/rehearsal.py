"""A short sequence that goes through all that a step does."""

from __future__ import annotations

from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.core.step import DecodeRow, NewSequence, PrefillRow, RunnerInfo, Step


def rehearsal(info: RunnerInfo, sampling: SamplingParams) -> list[Step]:
    """Its steps, in slot 0 and the scratch page."""
    size, tokens = info.cache.page_size, tuple(range(3))
    pages = (0, 0) if info.num_pages else ()
    others = (pages,) * (len(info.cache.windows) - 1)
    new = NewSequence(0, sampling, tokens * size, size * len(tokens))
    return [
        Step(0, new=(new,), prefills=(PrefillRow(0, 0, tokens[:1] * size, pages, False, others),)),
        Step(1, prefills=(PrefillRow(0, size, tokens, pages, True, others),)),
        Step(2, decodes=(DecodeRow(0, size + len(tokens), pages, others),)),
        Step(3, released=(0,)),
    ]
