"""What MLX's attention costs a chunk of a prompt, by kind of mask: at a shape that is new, and at one that is not.

    python benchmarks/prompt_attention.py [--heads 24] [--kv-heads 8] [--dim 128] [--layers 28]
        [--queries 64,230,512,1024,2048] [--keys 2000,20000,60000] [--output results.json]

"causal" is the mask that attention knows by name, "added" an array of the scores' type, "boolean" an array of booleans.
A backend that plans each shape shows in the first column, whatever the mask. Where "added" takes less again than
"causal" the first time, a chunk whose shape will not come again is better off padded to one that will, with such a
mask. All layers of a model are chained in one graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import mlx.core as mx

ROUNDS = 5


def milliseconds(queries: mx.array, keys: mx.array, values: mx.array, *, mask: mx.array | str, layers: int) -> float:
    """Of one graph in which each layer's attention takes the output of the one before."""
    begun = time.perf_counter()
    for _ in range(layers):
        queries = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1, mask=mask)
    mx.eval(queries)
    return 1000 * (time.perf_counter() - begun)


def masks_of(num_queries: int, num_keys: int, dtype: mx.Dtype) -> dict[str, mx.array | str]:
    """The same mask in its three forms."""
    seen = mx.arange(num_keys)[None] <= mx.arange(num_keys - num_queries, num_keys)[:, None]
    added = mx.where(seen, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))
    mx.eval(seen, added)
    return {"causal": "causal", "added": added, "boolean": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("heads", 24), ("kv-heads", 8), ("dim", 128), ("layers", 28)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("queries", [64, 230, 512, 1024, 2048]), ("keys", [2000, 20000, 60000])):
        parser.add_argument(f"--{name}", type=lambda text: [int(n) for n in text.split(",")], default=default)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    dtype = mx.bfloat16 if mx.default_device() == mx.Device(mx.gpu) else mx.float32
    found = []
    print("| queries x keys | mask | first time, ms | again, ms |\n| --- | --- | --- | --- |")
    for num_keys in given.keys:
        for num_queries in (count for count in given.queries if count < num_keys):
            queries = mx.random.normal((1, given.heads, num_queries, given.dim)).astype(dtype)
            keys, values = (mx.random.normal((1, given.kv_heads, num_keys, given.dim)).astype(dtype) for _ in range(2))
            mx.eval(queries, keys, values)
            for name, mask in masks_of(num_queries, num_keys, dtype).items():
                first, *more = (
                    milliseconds(queries, keys, values, mask=mask, layers=given.layers) for _ in range(1 + ROUNDS)
                )
                again = statistics.median(more)
                found.append({"queries": num_queries, "keys": num_keys, "mask": name, "first": first, "again": again})
                print(f"| {num_queries} x {num_keys} | {name} | {first:.1f} | {again:.1f} |", flush=True)
            mx.clear_cache()
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
