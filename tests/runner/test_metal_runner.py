"""What surrounds the Metal kernels, with the kernels emulated: the self-check, and whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import msgspec
import pytest
from driven import assert_same, prompts, run, submit
from forcing import Loop
from runner.metal.stand_in import MetalStandIn
from runner.metal.support import emulator_for_tests
from stepped import payloads_of

from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.step import Runner, Step
from vllm_mlx.runner.kernel_pages import Kernels
from vllm_mlx.runner.kernels import dialect, packed_paging, paging, source
from vllm_mlx.runner.kernels.check import check_decode
from vllm_mlx.runner.kernels.variant import DecodeVariant

POOLS = {"key_pool", "value_pool", "key_scales", "value_scales"}


@pytest.fixture
def metal(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> MetalStandIn:
    """Kernels for Metal, emulated. Padded rows all write to page 0, which nobody reads: pools may be raced for."""
    stand_in = MetalStandIn(emulator_for_tests(pytestconfig, tmp_path_factory), in_place=POOLS, raced=POOLS)
    monkeypatch.setattr(mx.fast, "metal_kernel", stand_in)
    return stand_in


def variant(**changes: Any) -> DecodeVariant:
    fields: dict[str, Any] = {"key_dim": 32, "value_dim": 32, "heads": 2, "kv_heads": 1, "dtype": "float32"}
    return DecodeVariant(**(fields | {"page_size": 32, "scale": 0.2} | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_self_check_passes_what_is_right(metal: MetalStandIn, dtype: str) -> None:
    check = check_decode(variant(dtype=dtype, window=100, has_sinks=True), "metal")
    assert check.problem is None
    assert 0 < check.error < 3e-3
    assert metal.num_launches > 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_self_check_covers_quantised_pages(metal: MetalStandIn, dtype: str, bits: int) -> None:
    check = check_decode(variant(dtype=dtype, bits=bits, value_dim=64, num_queries=2), "metal")
    assert check.problem is None
    assert check.name.endswith(f"int{bits} pages")


@pytest.mark.parametrize(
    ("where", "text", "right", "wrong"),
    [
        (packed_paging, "WRITE_BODY", "MAX(-low, high)", "high"),
        (packed_paging, "WRITE_BODY", "+ group;\n    UNROLL", ";\n    UNROLL"),
        (packed_paging, "READ_BODY", "* META_SCALE(meta)", ""),
        (source, "DECODE_BODY", "* META_SCALE(value_meta[u][c])", ""),
    ],
)
def test_self_check_tells_what_is_wrong_with_quantised_pages(
    metal: MetalStandIn, monkeypatch: pytest.MonkeyPatch, where: Any, text: str, right: str, wrong: str
) -> None:
    whole = getattr(where, text)
    assert right in whole, "the kernel has changed: this test needs another way to break it"
    monkeypatch.setattr(where, text, whole.replace(right, wrong))
    check = check_decode(variant(bits=8, key_dim=128, value_dim=128), "metal")
    assert "differs from plain operations by" in (check.problem or "")


@pytest.mark.parametrize(
    ("where", "text", "right", "wrong", "problem"),
    [
        (source, "DECODE_BODY", "sum[v] *= keep;", "", "differs from plain operations by"),
        (source, "COMBINE_BODY", "joined * factor", "joined", "differs from plain operations by"),
        (source, "COMBINE_BODY", "joined * factor", "nonsense", "nonsense"),
        (paging, "WRITE_BODY", "VALUE_CHUNKS + c]", "VALUE_CHUNKS]", "differs from plain operations by inf"),
        (dialect, "METAL_PRELUDE", "exp2(x)", "exp(x)", "differs from plain operations by"),
    ],
)
def test_self_check_tells_what_is_wrong(
    metal: MetalStandIn, monkeypatch: pytest.MonkeyPatch, where: Any, text: str, right: str, wrong: str, problem: str
) -> None:
    whole = getattr(where, text)
    assert right in whole, "the kernel has changed: this test needs another way to break it"
    monkeypatch.setattr(where, text, whole.replace(right, wrong))
    check = check_decode(variant(), "metal")
    assert problem in (check.problem or "")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "auto"),
        ("gpt_oss", "auto"),
        ("gemma3_text", "auto"),
        ("qwen3_next", "auto"),
        ("llama", "int8"),
        ("gpt_oss", "int4"),
    ],
)
def test_model_generates_the_same_through_kernels(
    metal: MetalStandIn, name: str, dtype: str, open_runner: Callable[..., Runner]
) -> None:
    submits = [submit(str(i), prompt, max_tokens=3) for i, prompt in enumerate(prompts(35, 6))]
    expected = run(open_runner(name, kv_cache_dtype=dtype), submits, config=Config())
    runner = open_runner(name, kernels=Kernels("metal"), max_num_seqs=4, kv_cache_dtype=dtype)
    assert Layout.PAGES in {layer.layout for layer in runner.info.cache.layers}
    assert [status.problem for status in runner.info.kernels] == [None] * len(runner.info.kernels)
    before = metal.num_launches
    tolerance = 1e-4 if dtype == "auto" else 1e-3
    assert_same(run(runner, submits, config=Config(max_num_seqs=4)), expected, tolerance=tolerance)
    assert metal.num_launches > before


@pytest.mark.parametrize(("name", "dtype"), [("llama", "auto"), ("gpt_oss", "int8")])
def test_known_tokens_are_computed_side_by_side(
    metal: MetalStandIn, name: str, dtype: str, open_runner: Callable[..., Runner]
) -> None:
    runner = open_runner(name, kernels=Kernels("metal"), max_num_seqs=8, kv_cache_dtype=dtype)
    asked = submit("a", prompts(30)[0], logprobs=None)
    asked = msgspec.structs.replace(asked, sampling=asked.sampling.replace(grammar="? 40 41 42 43 ?", max_tokens=6))
    one_by_one, chunked = (Loop(runner, Config(max_num_seqs=8), end=2, chunked=chunked) for chunked in (False, True))
    assert chunked.run(asked) == one_by_one.run(asked)
    assert (max(one_by_one.num_rows), max(chunked.num_rows)) == (1, 4)


@pytest.mark.parametrize("dtype", ["auto", "int8", "int4"])
def test_whole_pages_are_copied_as_they_are(
    metal: MetalStandIn, dtype: str, open_runner: Callable[..., Runner]
) -> None:
    runner = open_runner("llama", kernels=Kernels("metal"), max_num_seqs=4, kv_cache_dtype=dtype, num_pages=8)
    run(runner, [submit("a", prompts(70)[0], max_tokens=1)], config=Config(max_num_seqs=4))
    pages = runner._pages  # type: ignore[attr-defined]
    pages.copy([(1, 6), (2, 7)])
    for array in [array for pool in pages.pools for array in pool.arrays]:
        by_page = array.reshape(2, 8, -1)  # heads, pages
        assert mx.array_equal(by_page[:, 6:8], by_page[:, 1:3])
        assert mx.any(by_page[:, 1] != 0)


@pytest.mark.parametrize("dtype", ["auto", "int4"])
def test_whole_pages_go_out_and_come_back_as_they_are(
    metal: MetalStandIn, dtype: str, open_runner: Callable[..., Runner]
) -> None:
    runner = open_runner("llama", kernels=Kernels("metal"), max_num_seqs=4, kv_cache_dtype=dtype, num_pages=8)
    run(runner, [submit("a", prompts(70)[0], max_tokens=1)], config=Config(max_num_seqs=4))
    payloads = payloads_of(runner.collect(runner.launch(Step(1, exports=(1, 2)))))
    back = Step(2, exports=(1,), imports=((6, payloads[0]), (1, payloads[1])))
    assert payloads_of(runner.collect(runner.launch(back))) == payloads[:1], "read before it was written"
    assert payloads_of(runner.collect(runner.launch(Step(3, exports=(6, 1))))) == payloads
