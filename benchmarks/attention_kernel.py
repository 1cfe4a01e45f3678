"""The paged decode kernels alone: microseconds per call, TB/s of keys and values, against copies and MLX's attention.

    python benchmarks/attention_kernel.py [--scenario 64x8192] [--scenario 1x16384+31x256] [--heads 24/8] [--dim 128]
        [--dtype bfloat16] [--kv-bits 8] [--window N] [--sinks] [--page-size 32] [--calls 28] [--rounds 10]
        [--output FILE]

All calls of a round are chained in one graph, the output of each being the queries of the next, and take turns on pools
that together are larger than the device's caches; pages lie in random order. MLX's attention gets keys and values in
one piece and no mask, which it can do for rows of equal length only. On a CPU there are no kernels: the rest is told.

Needs MLX, NumPy and msgspec.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

from vllm_mlx.core.errors import ConfigError
from vllm_mlx.engine.measure import Scenario, parse_scenario
from vllm_mlx.runner import device
from vllm_mlx.runner.kernels.bandwidth import (
    Effort,
    Speed,
    copy_bandwidth,
    decode_bandwidth,
    kv_bytes,
    library_bandwidth,
)
from vllm_mlx.runner.kernels.variant import ELEMENT_BYTES, DecodeVariant

SCENARIOS = ("64x8192", "16x2048", "1x16384", "1x16384+31x256", "4x8192+60x512")


class Line(msgspec.Struct, frozen=True):
    """What one scenario gave. None: not measured."""

    scenario: str
    num_bytes: int
    """Keys and values that a call reads."""
    call_us: float | None
    bytes_per_s: float | None
    tokens_per_s: float | None
    """Tokens attended to: what counts when keys and values of other sizes are compared."""
    share_of_copy: float | None
    library_us: float | None
    library_bytes_per_s: float | None
    ratio_to_library: float | None
    """How many times faster the kernels are than MLX's attention."""


def measure_line(
    scenario: Scenario, variant: DecodeVariant, found: device.Device, *, copy_bytes_per_s: float, effort: Effort
) -> Line:
    """Both ways, one after the other."""
    kernels = decode_bandwidth(variant, scenario.lengths, found.backend, effort=effort)
    mx.clear_cache()
    library = library_bandwidth(variant, scenario.lengths, effort=effort)
    mx.clear_cache()
    return Line(
        scenario=scenario.text,
        num_bytes=kv_bytes(variant, scenario.lengths),
        call_us=_us(kernels),
        bytes_per_s=kernels.bytes_per_s if kernels else None,
        tokens_per_s=kernels.tokens_per_s if kernels else None,
        share_of_copy=kernels.bytes_per_s / copy_bytes_per_s if kernels else None,
        library_us=_us(library),
        library_bytes_per_s=library.bytes_per_s if library else None,
        ratio_to_library=library.call_s / kernels.call_s if kernels and library else None,
    )


def _us(speed: Speed | None) -> float | None:
    return None if speed is None else 1e6 * speed.call_s


def print_line(line: Line) -> None:
    """One scenario, '-' where nothing was measured."""
    cells = [
        _cell(line.call_us, ".1f"),
        _cell(line.bytes_per_s and line.bytes_per_s / 1e12, ".3f"),
        _cell(line.tokens_per_s and line.tokens_per_s / 1e9, ".3f"),
        _cell(line.share_of_copy, ".0%"),
        _cell(line.library_us, ".1f"),
        _cell(line.library_bytes_per_s and line.library_bytes_per_s / 1e12, ".3f"),
        _cell(line.ratio_to_library, ".2f"),
    ]
    print(f"{line.scenario:20}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", action="append", help=f"may be repeated; {', '.join(SCENARIOS)} without it")
    parser.add_argument("--heads", type=_pair, default="24/8", help="query heads / KV heads")
    parser.add_argument("--dim", type=_pair, default="128", help="elements of a head, of keys / of values")
    parser.add_argument("--dtype", default="bfloat16", choices=ELEMENT_BYTES)
    parser.add_argument("--kv-bits", type=int, choices=(8, 4), help="quantised keys and values; MLX's stay as they are")
    parser.add_argument("--window", type=int, help="tokens that a position looks back")
    parser.add_argument("--sinks", action="store_true", help="with attention sinks")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--calls", type=int, default=Effort().num_calls, help="chained in one graph")
    parser.add_argument("--rounds", type=int, default=Effort().num_rounds, help="the best one counts")
    parser.add_argument("--cache-mib", type=int, default=Effort().min_bytes >> 20, help="least size of all pools")
    parser.add_argument("--output", type=Path, help="write the results here too, as JSON")
    return parser.parse_args(argv)


def _pair(text: str) -> tuple[int, int]:
    """'24/8' or '128' (twice the same)."""
    found = re.fullmatch(r"([1-9]\d*)(?:/([1-9]\d*))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or two like 24/8")
    return int(found[1]), int(found[2] or found[1])


def make_variant(given: argparse.Namespace) -> DecodeVariant:
    """What was asked for."""
    (heads, kv_heads), (key_dim, value_dim) = given.heads, given.dim
    return DecodeVariant(
        key_dim=key_dim,
        value_dim=value_dim,
        heads=heads,
        kv_heads=kv_heads,
        dtype=given.dtype,
        page_size=given.page_size,
        scale=key_dim**-0.5,
        window=given.window,
        has_sinks=given.sinks,
        bits=given.kv_bits,
    )


def main(argv: Sequence[str]) -> None:
    given = parse_arguments(argv)
    variant, found = make_variant(given), device.probe()
    try:
        scenarios = [parse_scenario(text) for text in given.scenario or SCENARIOS]
    except ConfigError as error:
        raise SystemExit(error.message) from error
    effort = Effort(num_calls=given.calls, num_rounds=given.rounds, min_bytes=given.cache_mib << 20)
    copy_bytes_per_s = copy_bandwidth(found.backend, found.memory_bytes)
    mx.clear_cache()
    print(f"{found.name} ({found.backend}), MLX {mx.__version__}: copies {copy_bytes_per_s / 1e12:.3f} TB/s")
    dims = f"{variant.key_dim}/{variant.value_dim}"
    heads = f"{variant.heads}/{variant.kv_heads} heads of {dims}"
    form = given.dtype if given.kv_bits is None else f"{given.dtype}, int{given.kv_bits} pages"
    print(f"{heads}, {form}, pages of {given.page_size}, {given.calls} calls a graph")
    if not found.is_gpu:
        print("no paged kernels: there is no GPU")
    names = ("us/call", "TB/s", "Gtokens/s", "of copies", "MLX us", "MLX TB/s", "MLX/ours")
    print(f"\n{'rows x tokens':20}" + "".join(f"{name:>11}" for name in names), flush=True)
    lines = []
    for scenario in scenarios:
        lines.append(measure_line(scenario, variant, found, copy_bytes_per_s=copy_bytes_per_s, effort=effort))
        print_line(lines[-1])
    if given.output is not None:
        results: dict[str, Any] = {
            "device": found.name,
            "backend": found.backend,
            "mlx": mx.__version__,
            "variant": msgspec.to_builtins(variant),
            "effort": msgspec.to_builtins(effort),
            "copy_bytes_per_s": copy_bytes_per_s,
            "results": msgspec.to_builtins(lines),
        }
        given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
