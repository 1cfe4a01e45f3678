"""Pairwise test designs: few cases in which every two values of different dimensions meet."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

Case = dict[str, Any]
CANDIDATES = 60


def all_pairs(dimensions: Mapping[str, Sequence[Any]], is_possible: Callable[[Case], bool]) -> list[Case]:
    """Cases in which every pair of values occurs that can: greedy, the same in every run."""
    chance = random.Random(0)
    pairs = {
        (a, x, b, y)
        for a, b in combinations(dimensions, 2)
        for x in range(len(dimensions[a]))
        for y in range(len(dimensions[b]))
    }
    cases = []
    while pairs:
        seed = min(pairs)
        candidates = [_candidate(dimensions, seed, chance) for _ in range(CANDIDATES)]
        possible = [each for each in candidates if is_possible(_values(dimensions, each))]
        if not possible:
            pairs.discard(seed)
            continue
        best = max(possible, key=lambda candidate: len(_pairs(candidate) & pairs))
        pairs -= _pairs(best)
        cases.append(_values(dimensions, best))
    return cases


def _candidate(dimensions: Mapping[str, Sequence[Any]], seed: tuple[Any, ...], chance: random.Random) -> dict[str, int]:
    a, x, b, y = seed
    drawn = {name: chance.randrange(len(values)) for name, values in dimensions.items()}
    return drawn | {a: x, b: y}


def _pairs(candidate: dict[str, int]) -> set[tuple[Any, ...]]:
    return {(a, candidate[a], b, candidate[b]) for a, b in combinations(candidate, 2)}


def _values(dimensions: Mapping[str, Sequence[Any]], candidate: dict[str, int]) -> Case:
    return {name: dimensions[name][index] for name, index in candidate.items()}
