"""Variants of the decode kernels in which every two properties meet, and batches that try them."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
from runner.metal.covering import all_pairs

from vllm_mlx.runner.kernels.plan import PADDED, DecodePlan, plan_items
from vllm_mlx.runner.kernels.variant import DecodeVariant

DTYPES = ("float32", "float16", "bfloat16")
PAGE_SIZES = (16, 32, 64)

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "dims": ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)),
    "group": ((1,), (2,), (4,), (8,), (16,), (3, 5, 7, 9, 11, 13, 15), (6, 10, 12, 14)),
    "num_queries": ((1,), (2,), (4,), (8,), (3, 5, 6, 7)),
    "dtype": DTYPES,
    "page_size": PAGE_SIZES,
    "kv_heads": (1, 2, 3),
    "window": (None, 9, 70),
    "has_sinks": (False, True),
    "softcap": (None, 2.0),
    "bits": (None, 8, 4),
    "items": ("planned", "page by page"),
}


def is_small(case: dict[str, Any]) -> bool:
    """Whether the emulator is soon done: large heads times many of them take long."""
    return max(case["group"]) * max(case["num_queries"]) * case["kv_heads"] * max(case["dims"]) <= 16 * 8 * 192


def decode_cases() -> list[tuple[DecodeVariant, str]]:
    """Variants, and how their tokens are cut. Where a value stands for several, they take turns."""
    cases, turns = [], {values: cycle(values) for name in ("group", "num_queries") for values in DIMENSIONS[name]}
    for case in all_pairs(DIMENSIONS, is_small):
        group, num_queries = next(turns[case["group"]]), next(turns[case["num_queries"]])
        key_dim, value_dim = case["dims"]
        variant = DecodeVariant(
            key_dim=key_dim,
            value_dim=value_dim,
            heads=group * case["kv_heads"],
            kv_heads=case["kv_heads"],
            dtype=case["dtype"],
            page_size=case["page_size"],
            scale=key_dim**-0.5,
            num_queries=num_queries,
            window=case["window"],
            softcap=case["softcap"],
            has_sinks=case["has_sinks"],
            bits=case["bits"],
        )
        cases.append((variant, case["items"]))
    return cases


def describe(case: Any) -> str:
    variant, items = case
    words = [f"{variant.key_dim}x{variant.value_dim}", f"{variant.heads}on{variant.kv_heads}", variant.dtype]
    words += [f"page{variant.page_size}", f"q{variant.num_queries}", f"window{variant.window}"]
    words += ["sinks" * variant.has_sinks, "cap" * bool(variant.softcap)]
    words += [f"int{variant.bits}" if variant.bits else "", items.split()[0]]
    return "-".join(filter(None, words))


def positions_for(variant: DecodeVariant, *, seed: int) -> list[int]:
    """Ragged rows: the first token, both sides of page borders, a longer one, and padding in between."""
    page = variant.page_size
    around = [0, page - variant.num_queries, page - 1, page, 2 * page - 1, 3 * page + 5]
    chosen = np.random.default_rng(seed).permutation(around)[:3].tolist()
    return [max(0, chosen[0]), PADDED, *(max(0, each) for each in chosen[1:]), 150 + seed % 7]


def plan_for(variant: DecodeVariant, positions: np.ndarray[Any, Any], items: str) -> DecodePlan:
    if items == "planned":
        return plan_items(
            positions,
            capacity=len(positions) + 3,
            page_size=variant.page_size,
            num_queries=variant.num_queries,
            window=variant.window,
        )
    return cut_page_by_page(variant, positions)


def cut_page_by_page(variant: DecodeVariant, positions: np.ndarray[Any, Any]) -> DecodePlan:
    """As many items as there can be: one per page."""
    items, starts = [], [0]
    for row, position in enumerate(positions.tolist()):
        end = position + variant.num_queries if position != PADDED else 0
        first = 0 if variant.window is None else max(0, position + 1 - variant.window)
        begins = range(first // variant.page_size * variant.page_size, end, variant.page_size)
        items += [[row, begin, min(end, begin + variant.page_size), position] for begin in begins]
        starts.append(len(items))
    items += [[-1] * 4] * 2
    return DecodePlan(np.array(items, np.int32), np.array(starts, np.int32))
