"""What is printed when the server is ready."""

from __future__ import annotations

import json
import shlex

import msgspec
import pytest

from vllm_mlx.cli.banner import banner, curl
from vllm_mlx.core.cachespec import CacheSpec, LayerSpec, Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.step import KernelStatus, MemoryUse, RunnerInfo

URL = "http://127.0.0.1:8000"


def info(num_pages: int = 101, kernels: tuple[KernelStatus, ...] = ()) -> RunnerInfo:
    return RunnerInfo(
        vocab_size=1000,
        max_model_len=8192,
        num_pages=num_pages,
        cache=CacheSpec(layers=(LayerSpec(Layout.PAGES),), page_size=32, page_bytes=2**20),
        backend="cpu",
        device="Some CPU",
        dtype="float32",
        notes=("BLAS: some",),
        kernels=kernels,
        memory=MemoryUse(weights=2**29),
    )


def test_banner_says_what_runs_where() -> None:
    text = banner(Config(served_model_name="mine"), info(), url=URL)
    for expected in ("http://127.0.0.1:8000/v1", "mine", "8,192 tokens", "cpu (Some CPU), float32", "BLAS: some"):
        assert expected in text
    assert "weights 0.50 GiB, KV cache 0.10 GiB = 3,200 tokens" in text


def test_banner_of_a_model_with_windows_says_how_many_sequences_fit() -> None:
    found = info(num_pages=1 + 3 * (256 + 34))
    windowed = msgspec.structs.replace(found, cache=msgspec.structs.replace(found.cache, windows=(None, 1024)))
    assert "KV cache 0.85 GiB = 3.0 sequences of 8,192 tokens" in banner(Config(), windowed, url=URL)


def test_banner_of_a_model_without_pages_states_no_capacity() -> None:
    assert "KV cache" not in banner(Config(), info(num_pages=0), url=URL)


def test_banner_names_the_kernels_or_why_they_are_not_used() -> None:
    good, bad = KernelStatus("decode 128", error=1e-3), KernelStatus("decode 64", "differs by 0.5", 0.5)
    assert "  Kernels  decode 128: checked\n" in banner(Config(), info(kernels=(good,)), url=URL)
    text = banner(Config(), info(kernels=(good, bad)), url=URL)
    assert "  Kernels  not used: decode 64: differs by 0.5\n" in text
    assert "checked" not in text
    assert "Kernels" not in banner(Config(), info(), url=URL)


@pytest.mark.parametrize("name", ["demo", "it's \"quoted\" $HOME", "ünï/modèl"])
def test_curl_is_a_shell_command_with_valid_json(name: str) -> None:
    words = shlex.split(curl(Config(served_model_name=name), URL))
    assert words[:2] == ["curl", f"{URL}/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == name
    assert body["messages"][0]["role"] == "user"


def test_key_is_never_printed() -> None:
    text = banner(Config(api_key="sk-secret"), info(), url=URL)
    assert "sk-secret" not in text
    assert '-H "Authorization: Bearer $VLLM_MLX_API_KEY"' in text


def test_open_server_without_a_key_is_pointed_out() -> None:
    assert "--api-key" in banner(Config(host="0.0.0.0"), info(), url=URL)
    assert "--api-key" not in banner(Config(host="0.0.0.0", api_key="k"), info(), url=URL)
    assert "--api-key" not in banner(Config(), info(), url=URL)
