"""Whether the next step is launched before or after the tokens of the one in flight are waited for.

Launched before, it is ready when the device is. But the masks of constrained sequences need those tokens, and if
launching takes longer than the device does, the tokens have long been there and the masks are made when it is too
late: the device waits for the host, and the host for the masks. Then waiting first costs nothing. Masks that take long
are made while the next step is launched, and its tokens chosen by a launch of their own; others are made first, and
choosing is part of the step.
"""

from __future__ import annotations

WAITS_LITTLE, WAITS_LONG = 0.1, 0.3
"""Shares of a round's time."""
MASKS_TAKE_LITTLE = 0.15
"""Share of a round's time. A launch of its own costs a GPU's host some tenths of a millisecond."""
WEIGHT = 0.2
"""Of the last round in the average."""


class Overlap:
    """Decides by what rounds with constrained steps have taken."""

    def __init__(self) -> None:
        self.collects_first = False
        self._share = 1.0
        self._round_s = 0.0

    def makes_masks_first(self, work_s: float) -> bool:
        """Whether masks that take so long are made before the step that they are for is launched."""
        return self.collects_first and work_s < MASKS_TAKE_LITTLE * self._round_s

    def observe(self, waited_s: float, round_s: float) -> None:
        """How long a round took, and how much of it was waiting for tokens."""
        if round_s <= 0:
            return
        self._share += WEIGHT * (waited_s / round_s - self._share)
        self._round_s += WEIGHT * (round_s - self._round_s)
        if self._share < WAITS_LITTLE:
            self.collects_first = True
        elif self._share > WAITS_LONG:
            self.collects_first = False
