"""How a broken promise of `core.step` is told."""

from __future__ import annotations


class ContractError(AssertionError):
    """A step breaks a promise of `core.step`."""


def expect(holds: bool, message: str) -> None:
    """Raise ContractError unless `holds`."""
    if not holds:
        raise ContractError(message)
