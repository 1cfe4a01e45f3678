"""Quantised products by row count: as the model calls them, rows folded, rows padded, and with the weight expanded.

    python benchmarks/quantised_rows.py [--shapes 8192x3072,128256x3072] [--bits 4,8] [--modes affine] [--model FOLDER]

Prints microseconds per product of activations `[rows, 1, K]`, chained in one graph, and the way that a served model
would take. Several weights of a shape take turns, as layers do; `--weights 1` uses one, which may stay in a cache.
`--model` measures a folder's own weights as a server would when it starts (needs mlx-lm).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from vllm_mlx.runner.fold_timing import (
    EXPANDED_ROW_COUNTS,
    DeviceStopwatch,
    KindTimes,
    RowTimes,
    choose,
    expanded_gains,
    measure,
    should_expand,
)
from vllm_mlx.runner.quantised import PADDED_ROWS, Way, WeightKind

LLAMA_3B = "8192x3072,3072x8192,3072x3072,1024x3072,128256x3072"
DTYPES = {"bf16": mx.bfloat16, "fp16": mx.float16, "fp32": mx.float32}
GROUP_SIZES = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
OWN_BITS = {"mxfp4": 4, "mxfp8": 8, "nvfp4": 4}


def random_weights(kind: WeightKind, num_weights: int, dtype: mx.Dtype) -> list[nn.Module]:
    """Quantised layers of one kind."""
    layers = []
    for index in range(num_weights):
        layer = nn.Linear(kind.in_dims, kind.out_dims, bias=False)
        weight = mx.random.normal((kind.out_dims, kind.in_dims), scale=0.02, key=mx.random.key(index))
        layer.weight = weight.astype(dtype)
        layers.append(layer.to_quantized(kind.group_size, kind.bits, mode=kind.mode))
        mx.eval(layers[-1].parameters())
    return layers


def num_weights_of(kind: WeightKind, most: int) -> int:
    """As many as together take 1 GiB expanded, so that no cache holds them all."""
    return max(1, min(most, (1 << 30) // (2 * kind.out_dims * kind.in_dims)))


def measure_kind(kind: WeightKind, layers: list[nn.Module], rows: list[int], dtype: mx.Dtype) -> KindTimes:
    """Every way at every row count."""
    stopwatch = DeviceStopwatch(dtype)
    found = []
    for count in rows:
        ways = [Way.STRAIGHT, Way.FOLD] + [Way.PAD] * (count < PADDED_ROWS)
        times = {way: stopwatch(layers, count, way) for way in ways}
        found.append(RowTimes(count, tuple(times.items()), stopwatch(layers, count, None)))
    return KindTimes(kind, 1, tuple(found))


def print_table(times: KindTimes, name: str) -> None:
    """One kind of weight, a line per row count."""
    rule = choose([times]).rule(times.kind)
    print(f"\n{times.kind}, groups of {times.kind.group_size}; microseconds per product")
    print(f"| rows | [rows, 1, K] | [rows, K] | padded to {PADDED_ROWS} | {name} weight | chosen | gain |")
    print("|---|---|---|---|---|---|---|")
    for at in times.rows:
        ways, way = dict(at.ways), rule.way(at.rows)
        cells = [_us(ways.get(one)) for one in Way]
        chosen_s = ways.get(way, at.best_s)
        gain = f"{ways[Way.STRAIGHT] / chosen_s:.2f}" if Way.STRAIGHT in ways else "-"
        print(f"| {at.rows} | {' | '.join(cells)} | {_us(at.expanded_s)} | {way.value} | {gain} |", flush=True)


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def measure_model(folder: Path, dtype: mx.Dtype, name: str) -> None:
    """What a server measures and decides when it starts with this model."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    begun = time.perf_counter()
    measured = measure(model, DeviceStopwatch(dtype), expanded=True)
    elapsed_s = time.perf_counter() - begun
    for times in measured:
        print_table(times, name)
    gains = expanded_gains(measured)
    print(f"\nmeasured in {elapsed_s:.2f} s; a step's products with expanded weights, times as fast:")
    print(", ".join(f"{gains[rows]:.2f} at {rows} rows" for rows in EXPANDED_ROW_COUNTS if rows in gains))
    print("auto would", "expand the weights" if should_expand(gains) else "keep them quantised")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=LLAMA_3B, help="OUTxIN, comma separated")
    parser.add_argument("--bits", default="4,8", help="bits of affine weights")
    parser.add_argument("--modes", default="affine", help=f"of {', '.join(GROUP_SIZES)}")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--weights", type=int, default=8, help="most weights that take turns")
    parser.add_argument("--model", type=Path, help="a folder with quantised weights, instead of random ones")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    print(f"{mx.default_device()}, {mx.device_info().get('device_name', '')}, MLX {mx.__version__}")
    if args.model is not None:
        measure_model(args.model, dtype, args.dtype)
        return
    rows = [int(count) for count in args.rows.split(",")]
    for shape in args.shapes.split(","):
        out_dims, in_dims = (int(size) for size in shape.split("x"))
        for mode in args.modes.split(","):
            for bits in [OWN_BITS[mode]] if mode in OWN_BITS else [int(one) for one in args.bits.split(",")]:
                kind = WeightKind(out_dims, in_dims, bits, GROUP_SIZES[mode], mode)
                layers = random_weights(kind, num_weights_of(kind, args.weights), dtype)
                print_table(measure_kind(kind, layers, rows, dtype), args.dtype)


if __name__ == "__main__":
    main()
