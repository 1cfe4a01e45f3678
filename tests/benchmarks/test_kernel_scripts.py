"""The scripts that measure kernels and draw steps, each run small."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree as ET

import mlx.core as mx
import pytest
from runner.metal.stand_in import MetalStandIn
from runner.metal.support import emulator_for_tests

from vllm_mlx.runner import device

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
TIMEOUT_S = 180.0
SMALL = ("--heads", "2/1", "--dim", "32", "--dtype", "float32", "--calls", "2", "--rounds", "1", "--cache-mib", "0")


def module(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), FOLDER / script)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=environment)


def steps(scenario: str, tokens_per_s: float) -> dict[str, Any]:
    return {"scenario": scenario, "decode_tokens_per_s": tokens_per_s}


def write(path: Path, found: object) -> Path:
    path.write_text(json.dumps(found))
    return path


# ---- attention_kernel.py ----


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="there is a GPU")
def test_cpu_has_the_library_s_attention_only(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    scenarios = ("--scenario", "2x40", "--scenario", "1x40+1x50")
    done = run("attention_kernel.py", *SMALL, *scenarios, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "no paged kernels: there is no GPU" in done.stdout
    report = json.loads(output.read_text())
    assert report["copy_bytes_per_s"] > 1e8
    equal, mixed = report["results"]
    assert (equal["num_bytes"], mixed["num_bytes"]) == (80 * 64 * 4, 90 * 64 * 4)
    assert equal["library_us"] > 0
    assert (equal["call_us"], mixed["call_us"], mixed["library_us"]) == (None, None, None)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("1x40+1x50")]
    assert line.split()[1:] == ["-"] * 7


def test_gpu_s_kernels_are_compared_with_copies_and_the_library(
    pytestconfig: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, output = module("attention_kernel.py"), tmp_path_factory.mktemp("results") / "results.json"
    monkeypatch.setattr(mx.fast, "metal_kernel", MetalStandIn(emulator_for_tests(pytestconfig, tmp_path_factory)))
    monkeypatch.setattr(device, "probe", lambda: device.Device("metal", "Emulated GPU", 1 << 26))
    script.main([*SMALL, "--scenario", "2x40", "--scenario", "1x40+1x50", "--output", str(output)])
    report = json.loads(output.read_text())
    equal, mixed = report["results"]
    assert equal["bytes_per_s"] == pytest.approx(1e6 * equal["num_bytes"] / equal["call_us"])
    assert equal["share_of_copy"] == pytest.approx(equal["bytes_per_s"] / report["copy_bytes_per_s"])
    assert equal["ratio_to_library"] == pytest.approx(equal["library_us"] / equal["call_us"])
    assert (mixed["call_us"] > 0, mixed["ratio_to_library"]) == (True, None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "x40" in line]
    assert lines[0][1] == f"{equal['call_us']:.1f}"


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--heads", "24-8"], "two like 24/8"), (["--scenario", "4x"], "is not ROWSxTOKENS")]
)
def test_wrong_arguments_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        module("attention_kernel.py").main(arguments)
    assert words in f"{stopped.value} {capsys.readouterr().err}"


# ---- plot_steps.py ----


def test_steps_are_collected_where_they_fit(tmp_path: Path) -> None:
    folder, output = tmp_path / "model", tmp_path / "steps.json"
    assert run("random_model.py", "tiny", folder).returncode == 0
    grid = ("--rows", "1,3", "--contexts", "40,9000", "--max-tokens", 6)
    done = run("plot_steps.py", "--collect", folder, "--output", output, *grid, "--", "--num-pages", "40")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out: --scenario") == 2
    points, device_name = module("plot_steps.py").read_points(output)
    assert [(point.engine, point.rows, point.context) for point in points] == [
        ("vllm-mlx", 1, 40),
        ("vllm-mlx", 3, 40),
    ]
    assert all(point.step_ms > 0 for point in points)
    assert device_name


def test_both_kinds_of_results_are_read(tmp_path: Path) -> None:
    script = module("plot_steps.py")
    bench = {"device": "GPU", "results": [steps("4x100", 400.0), steps("1x100+3x50", 1.0)]}
    compared = {"figures": {"4x100": {"ours": steps("4x100", 800.0), "mlx-lm": steps("4x100", 200.0)}}}
    assert script.read_points(write(tmp_path / "a", bench)) == ([("vllm-mlx", 4, 100, 10.0)], "GPU")
    points, _ = script.read_points(write(tmp_path / "b", compared))
    assert points == [("vllm-mlx", 4, 100, 5.0), ("mlx-lm", 4, 100, 20.0)]


@pytest.mark.parametrize("text", ["{", "[]", '{"results": []}'])
def test_file_without_results_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"results\.json"):
        module("plot_steps.py").read_points(path)


def test_drawing_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = write(tmp_path / "a", {"results": [steps("4x100", 400.0)]})
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        module("plot_steps.py").main([str(results), "--output", str(tmp_path / "steps.svg")])


def test_drawing_has_a_line_per_context_and_per_number_of_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script, output = module("plot_steps.py"), tmp_path / "steps.svg"
    found = [script.Point(engine, rows, 100, 1.0 + rows) for engine in ("vllm-mlx", "mlx-lm") for rows in (1, 4)]
    with_texts = pytest.MonkeyPatch()
    import matplotlib as mpl

    with_texts.setitem(mpl.rcParams, "svg.fonttype", "none")
    try:
        script.draw(found, output, title="Some device")
    finally:
        with_texts.undo()
    words = {element.text for element in ET.parse(output).iter() if element.text}
    expected = {"Some device", "100 tokens, vllm-mlx", "100 tokens, mlx-lm", "1 rows, vllm-mlx", "4 rows, mlx-lm"}
    assert expected <= words
