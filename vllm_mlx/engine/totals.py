"""Statistics over all the engines that a client has had."""

from __future__ import annotations

from collections import Counter

import msgspec

from vllm_mlx.core.messages import DiskStats, Stats

_COUNTERS = ("num_preemptions", "num_steps", "num_tokens", "num_evicted_pages")
_DISK_COUNTERS = ("num_saved", "bytes_written", "num_hits", "bytes_read", "num_misses", "num_corrupt", "num_evicted")


class StatsTotals:
    """Statistics whose counters go on when a new engine starts from zero."""

    def __init__(self) -> None:
        self._earlier = Stats()
        self._present = Stats()

    @property
    def total(self) -> Stats:
        """The present engine's state, with the counters of all engines.

        What is on disk is still there while no engine looks at it.
        """
        earlier, present = self._earlier, self._present
        sums = {name: getattr(earlier, name) + getattr(present, name) for name in _COUNTERS}
        return msgspec.structs.replace(present, **sums, disk=_disk_total(earlier.disk, present.disk))

    def update(self, stats: Stats) -> None:
        """Take a report. Two threads of an engine report, so an older one may come late; it is ignored."""
        if _age(stats) >= _age(self._present):
            self._present = stats

    def engine_ended(self) -> None:
        """Nothing runs any more; keep the counters."""
        total = self.total
        disk = total.disk and msgspec.structs.replace(total.disk, queued_bytes=0, ahead_bytes=0, problem=None)
        self._earlier = msgspec.structs.replace(total, disk=disk)
        self._present = Stats()


def _age(stats: Stats) -> tuple[int, int]:
    """Rises with time: of two reports of one engine, the greater is not the older. Disks go on between steps."""
    return stats.num_steps, sum(getattr(stats.disk, name) for name in _DISK_COUNTERS) if stats.disk else 0


def _disk_total(earlier: DiskStats | None, present: DiskStats | None) -> DiskStats | None:
    if earlier is None or present is None:
        return present or earlier
    sums = {name: getattr(earlier, name) + getattr(present, name) for name in _DISK_COUNTERS}
    num_refused = Counter(earlier.num_refused) + Counter(present.num_refused)
    return msgspec.structs.replace(present, **sums, num_refused=dict(num_refused))
