"""What was found out about shapes and tools: a grammar, or why there is none."""

from __future__ import annotations

from collections import OrderedDict

from vllm_mlx.core.errors import InvalidRequest

MAX_KEPT = 256
MAX_CHARS = 16 * 1024 * 1024
"""Of all grammars together that are kept."""

Verdict = str | InvalidRequest


class Verdicts:
    """The verdicts that were asked for last, by key."""

    def __init__(self, *, max_kept: int = MAX_KEPT, max_chars: int = MAX_CHARS) -> None:
        self._max_kept = max_kept
        self._max_chars = max_chars
        self._kept: OrderedDict[bytes, Verdict] = OrderedDict()
        self._num_chars = 0

    def get(self, key: bytes) -> Verdict | None:
        """The verdict, if it is still known."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def add(self, key: bytes, verdict: Verdict) -> None:
        """Keep one; the ones that nobody asked for longest go."""
        self._drop(key)
        self._kept[key] = verdict
        self._num_chars += _size(verdict)
        while len(self._kept) > self._max_kept or self._num_chars > self._max_chars:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        verdict = self._kept.pop(key, None)
        self._num_chars -= 0 if verdict is None else _size(verdict)


def _size(verdict: Verdict) -> int:
    return len(verdict if isinstance(verdict, str) else verdict.message)
