"""Filling in the middle: prompts of models that were taught what stands before and behind a gap.

The method is that of Bavarian et al., arXiv:2207.14255; each family has tokens and an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vllm_mlx.chat.tokenizer import Tokenizer


class InfillFormat(msgspec.Struct, frozen=True):
    """How one family marks the parts: each a piece of the vocabulary."""

    prefix: str
    suffix: str
    middle: str | None
    """What the answer follows; None: it follows the text before the gap."""
    is_suffix_first: bool = False
    stops: tuple[str, ...] = ()
    """Pieces that end an answer besides the model's own, as far as the vocabulary has them."""


FORMATS = (
    InfillFormat(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        stops=("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    InfillFormat(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        stops=("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>"),
    ),
    InfillFormat("<fim-prefix>", "<fim-suffix>", "<fim-middle>", stops=("<|endoftext|>", "<fim-pad>")),
    InfillFormat("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    InfillFormat("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", is_suffix_first=True),
    InfillFormat("▁<PRE>", "▁<SUF>", "▁<MID>", stops=("▁<EOT>",)),
    InfillFormat("[PREFIX]", "[SUFFIX]", None, is_suffix_first=True),
)
"""Qwen and CodeGemma; StarCoder 2; SantaCoder; DeepSeek; Seed-Coder; CodeLlama; Codestral."""


class Infill(msgspec.Struct, frozen=True):
    """One model's way to fill in."""

    prefix_id: int
    suffix_id: int
    middle_ids: tuple[int, ...]
    is_suffix_first: bool
    begin_ids: tuple[int, ...]
    """What every text begins with."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end the answer, besides the model's own."""

    def token_ids(self, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> tuple[int, ...]:
        """The prompt for what is missing between two texts."""
        before, behind = (self.prefix_id, *prefix), (self.suffix_id, *suffix)
        parts = (*behind, *before) if self.is_suffix_first else (*before, *behind)
        return (*self.begin_ids, *parts, *self.middle_ids)


def find_infill(tokenizer: Tokenizer) -> Infill | None:
    """How a model fills in, by its vocabulary; None if it was not taught to."""
    for form in FORMATS:
        pieces = [form.prefix, form.suffix, *((form.middle,) if form.middle else ())]
        ids = _known(tokenizer.token_id, pieces)
        if len(ids) == len(pieces):
            begin = tokenizer.encode("", add_special_tokens=True)[:1]
            bos = tokenizer.token_id(tokenizer.bos_token) if tokenizer.bos_token is not None else None
            return Infill(
                ids[0],
                ids[1],
                ids[2:],
                form.is_suffix_first,
                begin if begin == (bos,) else (),
                (*ids, *_known(tokenizer.token_id, form.stops)),
            )
    return None


def _known(token_id: Callable[[str], int | None], pieces: list[str] | tuple[str, ...]) -> tuple[int, ...]:
    return tuple(found for found in map(token_id, pieces) if found is not None)
