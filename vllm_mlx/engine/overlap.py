"""Whether the next step is started before or after the tokens of the one in flight are waited for.

Started before, it is ready when the device is. But if starting takes longer than the device does, as on a fast GPU, the
tokens have long been there: clients get them late by as much, and the masks of constrained sequences, which need them,
are made when the device waits for the host already. Then waiting between building the next step and starting it costs
nothing, and the masks are made while it is started.
"""

from __future__ import annotations

WAITS_LITTLE, WAITS_LONG = 0.1, 0.3
"""Shares of a round's time."""
WEIGHT = 0.2
"""Of the last round in the average."""


class Overlap:
    """Decides by what rounds have taken in which somebody waited for tokens."""

    def __init__(self) -> None:
        self.collects_first = False
        self._share = 1.0

    def observe(self, waited_s: float, round_s: float) -> None:
        """How long a round took, and how much of it was waiting for tokens."""
        if round_s <= 0:
            return
        self._share += WEIGHT * (waited_s / round_s - self._share)
        if self._share < WAITS_LITTLE:
            self.collects_first = True
        elif self._share > WAITS_LONG:
            self.collects_first = False
