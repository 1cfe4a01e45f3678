"""The scripts that measure the engine, each run small; what they print is what people read."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TIMEOUT_S = 180.0


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done


def module(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), FOLDER / script)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look it up
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    run("random_model.py", "tiny", folder)
    return folder


@pytest.mark.parametrize("more", [(), ("--constrained",)], ids=["free", "constrained"])
def test_host_step_measures_every_combination(more: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    inputs = "builtins:len"
    run(
        *("host_step.py", "--rows", "1,3", "--contexts", "40,90", "--steps", 5, "--rounds", 2),
        *("--inputs", inputs, "--output", output, *more),
    )
    lines = json.loads(output.read_text())
    assert [(line["rows"], line["context"]) for line in lines] == [(1, 40), (1, 90), (3, 40), (3, 90)]
    assert all(0 < line["plan"] < line["total"] <= line["worst"] and line["inputs"] > 0 for line in lines)


def test_device_gap_tells_of_all_three_engines() -> None:
    told = run("device_gap.py", "--rows", 2, "--step-ms", 0.2, "--launch-ms", 0.05).stderr
    assert re.findall(r"^(bare loop|thread|process)$", told, re.MULTILINE) == ["bare loop", "thread", "process"]
    assert len(re.findall(r"device idle +[\d.]+ %", told)) == 3


def test_both_engines_run_the_same_scenarios(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    settings = ("--", "--max-num-seqs", "4")
    told = run(
        *("compare_engines.py", model, "--scenario", "1x40+2x10", "--max-tokens", 8, "--warmup", 0),
        *("--output", output, *settings),
    )
    figures = json.loads(output.read_text())["figures"]["1x40+2x10"]
    assert list(figures) == ["ours", "mlx-lm"]
    assert {name: (f["rows"], f["prompt_tokens"], f["num_steps"]) for name, f in figures.items()} == {
        "ours": (3, 60, 5),
        "mlx-lm": (3, 60, 5),
    }
    ratio = figures["ours"]["decode_tokens_per_s"] / figures["mlx-lm"]["decode_tokens_per_s"]
    assert f"{ratio:.2f} x" in told.stdout


def test_engine_that_cannot_run_a_scenario_leaves_the_other(model: Path) -> None:
    told = run(
        *("compare_engines.py", model, "--scenario", "3x10", "--max-tokens", 4, "--warmup", 0),
        *("--engines", "ours,mlx-lm", "--", "--max-num-seqs", "2"),
    )
    assert "3x10: ours failed" in told.stderr
    assert "more rows than --max-num-seqs 2" in told.stderr
    assert "mlx-lm" in told.stdout


def test_lines_of_a_prototype_are_found_by_scenario() -> None:
    script = module("compare_engines.py")
    text = (
        "loading\n"
        "16 x 2048                    padded             12.15 ms     1317 tok/s  peak 11.8 GB\n"
        "1 x 16384 + 31 x 256         kernel+compile     13.90 ms     2,301 tok/s  peak 12.1 GB\n"
    )
    comparison = script.Comparison(prototype=script.parse_prototype(text))
    assert comparison.lines_of("1x16384+31x256") == [("prototype kernel+compile", 13.9, 2301.0, 12.1)]
    assert comparison.lines_of("16x2048") == [("prototype padded", 12.15, 1317.0, 11.8)]
    assert comparison.lines_of("1x1") == []
    assert script.run_prototype("no/such/script.py tiny") == []


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_random_model_has_finite_logits(bits: int | None, tmp_path: Path) -> None:
    import mlx.core as mx

    from vllm_mlx.runner.load import untouched_file_limit

    with untouched_file_limit():
        from mlx_lm.utils import load_model
    run("random_model.py", "tiny", tmp_path, "--vocab", 320, *([] if bits is None else ["--bits", bits]))
    model, config = load_model(tmp_path)
    logits = model(mx.array([[1, 2, 3]])).astype(mx.float32)
    assert logits.shape == (1, 3, 320)
    assert mx.isfinite(logits).all().item()
    assert 0.05 < mx.std(logits).item() < 5
    assert config.get("quantization", {}).get("bits") == bits


def test_random_model_takes_a_tokenizer_along(demo_model: Path, tmp_path: Path) -> None:
    run("random_model.py", "tiny", tmp_path, "--vocab", 49152, "--tokenizer", demo_model)
    assert (tmp_path / "tokenizer.json").read_bytes() == (demo_model / "tokenizer.json").read_bytes()
