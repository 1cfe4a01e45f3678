"""The script that measures what quantised pages cost, on a tiny model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import write_tiny_model

from vllm_mlx.runner.kernel_choice import quantise_pages


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "kv_quality.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def test_fewer_bits_are_further_from_full_precision(script: ModuleType, tmp_path: Path) -> None:
    model, layers = script.load_model(write_tiny_model("llama", tmp_path / "llama"))
    windows = [list(range(3, 150)), list(range(400, 500))]
    exact, eight, four = (script.compute(model, quantise_pages(layers, form)[0], windows) for form in script.FORMS)
    assert [len(tokens) for tokens in exact.top_tokens] == [146, 99]
    assert exact.perplexity > 1
    away = [abs(found.perplexity / exact.perplexity - 1) for found in (eight, four)]
    assert 0 < away[0] < 0.02
    assert away[0] < away[1] < 0.5
    shares = [script.share_of_same(found, exact) for found in (exact, eight, four)]
    assert shares[0] == 1
    assert 1 >= shares[1] > shares[2] > 0.2


def test_answers_are_compared_up_to_the_first_difference(script: ModuleType) -> None:
    assert script.num_same("abcd", "abcd") == 4
    assert script.num_same("abXd", "abcd") == 2
    assert script.num_same("Xbcd", "abcd") == 0
