"""Measurements of bandwidth: what is run, what is counted, and what is not measured at all. Never how fast it is."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from runner.metal.stand_in import MetalStandIn
from runner.metal.support import emulator_for_tests

from vllm_mlx.runner.kernels import bandwidth
from vllm_mlx.runner.kernels.bandwidth import Effort, copy_bandwidth, decode_bandwidth, library_bandwidth
from vllm_mlx.runner.kernels.variant import DecodeVariant

QUICK = Effort(num_calls=3, num_rounds=2, min_bytes=1)


@pytest.fixture
def metal(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> MetalStandIn:
    """Kernels for Metal, emulated."""
    stand_in = MetalStandIn(emulator_for_tests(pytestconfig, tmp_path_factory))
    monkeypatch.setattr(mx.fast, "metal_kernel", stand_in)
    return stand_in


def variant(**changes: Any) -> DecodeVariant:
    fields: dict[str, Any] = {"key_dim": 32, "value_dim": 32, "heads": 2, "kv_heads": 1, "dtype": "float32"}
    return DecodeVariant(**(fields | {"page_size": 32, "scale": 0.2} | changes))


@pytest.mark.parametrize(
    ("changes", "lengths", "num_bytes"),
    [
        ({}, [70, 1, 300], 371 * 64 * 4),
        ({"window": 50, "has_sinks": True}, [70, 1, 300], 101 * 64 * 4),
        ({"key_dim": 48, "dtype": "bfloat16"}, [40], 40 * 80 * 2),
        ({"value_dim": 48, "heads": 4, "kv_heads": 2}, [40], 40 * 2 * 80 * 4),
    ],
)
def test_calls_are_chained_and_their_keys_and_values_counted(
    metal: MetalStandIn, changes: dict[str, Any], lengths: list[int], num_bytes: int
) -> None:
    speed = decode_bandwidth(variant(**changes), lengths, "metal", effort=QUICK)
    assert speed is not None
    assert speed.num_bytes == num_bytes
    assert speed.bytes_per_s == pytest.approx(num_bytes / speed.call_s)
    assert metal.num_launches == 2 * 3 * (1 + 2)  # two kernels a call; one round more to compile


def test_chain_gives_what_plain_attention_gives(metal: MetalStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last call's output, with pages put in order by hand, is that of attention on whole keys and values."""
    one, outputs, pools = variant(kv_heads=2, scale=1.0), [], []
    make_pool, evaluate = bandwidth._paged_pool, mx.eval
    monkeypatch.setattr(bandwidth, "_paged_pool", lambda *a, **k: pools.append(make_pool(*a, **k)) or pools[-1])
    monkeypatch.setattr(mx, "eval", lambda *a: outputs.append(a) or evaluate(*a))
    effort = Effort(num_calls=3, num_rounds=1, min_bytes=2 * 2 * 64 * 100 * 4)
    assert decode_bandwidth(one, [50, 50], "metal", effort=effort) is not None
    assert len(pools) == 2
    assert not mx.array_equal(pools[0].table, pools[1].table)
    x = bandwidth._queries(one, 2)
    for pool in (pools[0], pools[1], pools[0]):
        keys, values = (p.reshape(2, -1, 32, 32)[:, pool.table].swapaxes(0, 1) for p in (pool.keys, pool.values))
        keys, values = (p.reshape(2, 2, -1, 32)[:, :, :50] for p in (keys, values))
        x = mx.fast.scaled_dot_product_attention(x, keys, values, scale=1.0)
    [last] = next(a[0] for a in reversed(outputs) if isinstance(a[0], list) and a[0][0].shape == x.shape)
    assert mx.allclose(last, x, rtol=1e-4, atol=1e-5)


def test_pools_together_exceed_caches_but_are_no_more_than_calls() -> None:
    num_bytes = 100 * 64 * 4
    for min_bytes, expected in ((1, 1), (num_bytes, 1), (num_bytes + 1, 2), (1000 * num_bytes, 28)):
        assert bandwidth._num_pools(variant(), [100], Effort(min_bytes=min_bytes)) == expected


def test_a_cpu_has_no_kernels_to_measure() -> None:
    assert decode_bandwidth(variant(), [100], "cpu") is None


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [({}, [100, 101]), ({"window": 10}, [100]), ({"softcap": 5.0}, [100]), ({"num_queries": 2}, [100])],
)
def test_the_library_is_not_measured_where_it_needs_a_mask(changes: dict[str, Any], lengths: list[int]) -> None:
    assert library_bandwidth(variant(**changes), lengths, effort=QUICK) is None


@pytest.mark.parametrize("changes", [{}, {"key_dim": 48, "has_sinks": True}, {"dtype": "bfloat16"}])
def test_the_library_is_measured_on_equal_lengths(changes: dict[str, Any]) -> None:
    speed = library_bandwidth(variant(**changes), [100, 100], effort=QUICK)
    assert speed is not None
    size = {"bfloat16": 2}.get(changes.get("dtype", ""), 4)
    assert speed.num_bytes == 200 * (changes.get("key_dim", 32) + 32) * size
    assert speed.call_s > 0


def test_copies_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    ones = mx.ones
    monkeypatch.setattr(mx, "ones", lambda shape, dtype: sizes.append(shape[0] * 4) or ones(shape, dtype))
    assert copy_bandwidth("cpu", 1 << 24) > 0
    assert copy_bandwidth("metal", 1 << 25) > 0
    assert sizes == [1 << 20, 1 << 21]
