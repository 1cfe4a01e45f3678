"""What the manager answers, and the rules that it follows."""

from __future__ import annotations

from enum import Enum

import msgspec

from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.step import RunnerInfo
from vllm_mlx.kv.disk import Export

PROMPT_INTERVAL = 2048
ROWS_INTERVAL = 256


class Admission(Enum):
    """Why a sequence gets no table now."""

    NO_ROOM = "no room"
    """Too few pages are free."""
    PREFIX_UNDER_WAY = "prefix under way"
    """Another sequence is computing the same prefix: waiting for it is cheaper than computing it again."""
    READING = "reading"
    """Its prefix is being loaded from the disk."""


class Admitted(msgspec.Struct, frozen=True):
    """A sequence has its pages."""

    num_cached: int
    """Tokens that need not be computed; never all known ones, because the last must be computed to go on."""
    checkpoint: int | None = None
    """What its layers outside pages start from."""


class CheckpointRules(msgspec.Struct, frozen=True):
    """How state outside pages is kept. Without such state there are no rules."""

    max_bytes: int
    can_be_cut: bool
    """All of it is rows: any beginning of them serves."""
    interval: int = PROMPT_INTERVAL
    """Tokens of a prompt between two checkpoints that cannot be cut."""
    decode_interval: int = ROWS_INTERVAL
    """Tokens between two while a sequence decodes."""


class Orders(msgspec.Struct, frozen=True):
    """What the runner is to do for the cache in the next step; fields as in `Step`."""

    exports: tuple[Export, ...]
    dropped: tuple[int, ...]
    imports: tuple[tuple[int, bytes], ...]
    checkpoint_imports: tuple[tuple[int, bytes], ...]
    copies: tuple[tuple[int, int], ...]


def checkpoint_rules(info: RunnerInfo) -> CheckpointRules | None:
    """How a model's state outside pages is kept; None if all of it is in pages."""
    layouts = {layer.layout for layer in info.cache.layers} - {Layout.PAGES}
    if not layouts:
        return None
    return CheckpointRules(
        max_bytes=info.checkpoint_bytes,
        can_be_cut=layouts == {Layout.ROWS},
        # A recurrent state is small; rows grow with the sequence and are not copied at every page.
        decode_interval=info.cache.page_size if layouts == {Layout.STATE} else ROWS_INTERVAL,
    )
