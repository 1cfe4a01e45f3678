"""Loading: precision, limits and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from driven import prompts, run, submit

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError, ModelError
from vllm_mlx.core.step import Runner
from vllm_mlx.runner.load import create_runner_factory


def load(path: Path, **settings: object) -> Runner:
    return create_runner_factory(path, Config(model=str(path), **{"num_pages": 16, **settings}))(lambda *_: None)


def copy_of(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a model folder with some values of config.json changed."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_a_cpu_computes_in_float32(open_runner: Callable[..., Runner]) -> None:
    runner = open_runner("llama")
    if runner.info.backend == "cpu":
        assert runner.info.dtype == "float32"


def test_dtype_can_be_chosen(open_runner: Callable[..., Runner]) -> None:
    assert open_runner("llama", dtype="bfloat16").info.dtype == "bfloat16"


def test_context_comes_from_the_model_or_the_operator(open_runner: Callable[..., Runner]) -> None:
    assert open_runner("llama", num_pages=512).info.max_model_len == 8192
    assert open_runner("llama", num_pages=512, max_model_len=100).info.max_model_len == 100


def test_context_longer_than_the_model_s_is_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"--max-model-len 9000 .* 8192"):
        load(tiny_model("llama"), max_model_len=9000)


def test_context_shrinks_to_what_the_pages_hold(open_runner: Callable[..., Runner]) -> None:
    info = open_runner("llama", num_pages=5).info
    assert info.max_model_len == 4 * info.cache.page_size
    assert any("--cache-memory-mb" in note for note in info.notes)


def test_cache_memory_sets_the_number_of_pages(open_runner: Callable[..., Runner]) -> None:
    info = open_runner("llama", num_pages=None, cache_memory_mb=2, max_num_seqs=1000).info
    assert info.num_pages == (2 << 20) // info.cache.page_bytes + 1


@pytest.fixture(scope="module")
def quantised_llama(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of 4-bit weights with float16 scales."""
    from mlx_lm.utils import load_model, quantize_model, save_model

    folder = tmp_path_factory.mktemp("quantised")
    model, config = load_model(tiny_model("llama"))
    model.set_dtype(mx.float16)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(str(folder), model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("weights_dtype", "dtype", "note", "tolerance"),
    [
        ("auto", "float32", "faster on a CPU", 1e-4),
        ("stored", "float32", "stay quantised", 1e-4),
        ("fp32", "float32", "expanded to float32", 1e-4),
        ("bf16", "bfloat16", "expanded to bfloat16", 0.05),
        ("fp16", "float16", "expanded to float16", 0.01),
    ],
)
def test_quantised_weights_are_loaded_in_the_form_asked_for(
    weights_dtype: str, dtype: str, note: str, tolerance: float, quantised_llama: Path
) -> None:
    from mlx_lm.utils import load_model

    runner = load(quantised_llama, weights_dtype=weights_dtype)
    if runner.info.backend != "cpu":
        pytest.skip("what a GPU does by itself depends on what it measures")
    reference, _ = load_model(quantised_llama)
    reference.set_dtype(mx.float32)
    (prompt,) = prompts(9)
    answer = run(runner, [submit("a", prompt, max_tokens=1)], config=Config())["a"]
    logits = reference(mx.array([prompt]))[0, -1]
    expected = logits - mx.logsumexp(logits)
    assert answer.logprobs[0] is not None
    assert answer.token_ids[0] == mx.argmax(expected).item()
    assert abs(answer.logprobs[0].logprob - mx.max(expected).item()) < tolerance
    assert runner.info.dtype == dtype
    assert any(note in line for line in runner.info.notes)


def test_form_and_type_of_weights_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"--weights-dtype bf16 computes in bfloat16, not in --dtype float16"):
        Config(weights_dtype="bf16", dtype="float16")
    assert Config(weights_dtype="bf16", dtype="bfloat16").weights_dtype == "bf16"


def test_importing_the_library_keeps_the_file_limit() -> None:
    script = """
import resource
from vllm_mlx.runner.load import untouched_file_limit
before = resource.getrlimit(resource.RLIMIT_NOFILE)
with untouched_file_limit():
    import mlx_lm.utils
assert resource.getrlimit(resource.RLIMIT_NOFILE) == before, "lowered"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such_architecture"}, "no_such_architecture"),
        ({"hidden_size": 128}, "cannot be loaded"),
        ({"num_hidden_layers": 3}, "cannot be loaded"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_line(
    changes: dict, message: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "broken", **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in caught.value.message


def test_truncated_weights_are_one_clear_line(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("stated", [-1, 0, True, "8192"])
def test_a_context_that_is_no_length_counts_as_not_stated(
    stated: object, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of(tiny_model("llama"), tmp_path / "m", max_position_embeddings=stated, text_config="none")
    assert load(folder, max_model_len=64).info.max_model_len == 64
