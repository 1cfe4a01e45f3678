"""When the state of a sequence is copied, and which of its copies stay."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_mlx.kv.admission import CheckpointRules
from vllm_mlx.kv.checkpoints import Checkpoints
from vllm_mlx.kv.tables import Table


class CheckpointPlan:
    """Follows the `rules` of a model that has state outside pages; without rules nothing is ever due."""

    def __init__(self, checkpoints: Checkpoints, *, rules: CheckpointRules | None, page_size: int) -> None:
        self._checkpoints = checkpoints
        self._rules = rules
        self._page_size = page_size

    def due(self, table: Table, num_computed: int) -> int | None:
        """The number of the checkpoint to take once `num_computed` tokens are computed; None if none is due."""
        rules = self._rules
        if rules is None or num_computed < self._page_size:
            return None
        if num_computed > table.num_known:
            is_due = num_computed % rules.decode_interval == 0
        else:
            is_due = num_computed == table.num_known if rules.can_be_cut else num_computed in table.stops
        return self._checkpoints.next_number() if is_due else None

    def keep(
        self, table: Table, number: int, token_ids: Sequence[int], *, num_computed: int, size_bytes: int
    ) -> list[bytes]:
        """A checkpoint was taken behind the first `num_computed` tokens; returns the names that it goes by.

        While a sequence decodes its newest takes the place of the one before.
        """
        assert self._rules is not None
        count = num_computed // self._page_size
        names = table.name_pages(token_ids, count, page_size=self._page_size)
        mine = names[:count] if self._rules.can_be_cut else names[count - 1 : count]
        former = None
        if num_computed > table.num_known:
            former, table.last_checkpoint = table.last_checkpoint, number
        is_pinned = table.is_pinned and num_computed <= table.num_known
        self._checkpoints.keep(number, mine, size_bytes=size_bytes, is_pinned=is_pinned)
        if former is not None and self._checkpoints.is_kept(former):
            self._checkpoints.drop(former)
        return mine
