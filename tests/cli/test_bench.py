"""`vllm-mlx bench` with a real, tiny model."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_mlx.cli.main import main
from vllm_mlx.core.config import Config
from vllm_mlx.engine.measure import Figures

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, str(ROOT / "benchmarks" / "random_model.py"), "tiny", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
    return folder


def test_table_has_a_line_per_scenario(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    scenarios = ["--scenario", "4x64", "--scenario", "1x200+3x20"]
    arguments = [*scenarios, "--max-tokens", "8", "--repetitions", "2", "--num-pages", "40", "--output", str(output)]
    assert main(["bench", str(model), *arguments]) == 0
    captured = capfd.readouterr()
    assert "measuring 4x64 0%" in captured.err
    lines = [line.split() for line in captured.out.splitlines() if re.match(r" *\d+x\d+", line)]
    assert [line[0] for line in lines] == ["4x64", "1x200+3x20"]
    report = json.loads(output.read_text())
    assert report["settings"] == {"model": str(model), "num_pages": 40}
    assert report["num_pages"] == 40
    first, second = (Figures(**figures) for figures in report["results"])
    assert (first.rows, first.prompt_tokens, second.rows, second.prompt_tokens) == (4, 256, 4, 260)
    assert first.num_steps == 2 * (7 - 2)
    assert first.pages_used >= 12
    assert first.decode_tokens_per_s == pytest.approx(4000 / first.decode_step_ms, rel=0.9)
    assert f"{first.decode_step_ms:.2f}" in lines[0]


def test_json_goes_to_standard_output(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num-prompts", "2", "--prompt-tokens", "5", "--max-tokens", "4", "--warmup", "0", "--format", "json"]
    assert main(["bench", str(model), *arguments, "--repetitions", "1", "--use-paged-cache"]) == 0
    captured = capsys.readouterr()
    [result] = json.loads(captured.out)["results"]
    assert (result["scenario"], result["rows"], result["num_steps"]) == ("2x5", 2, 3)
    assert captured.err.startswith("vllm-mlx: note: --use-paged-cache has no effect")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--scenario", "4x"], "--scenario: '4x' is not ROWSxTOKENS, like 16x2048 or 1x16384+31x256"),
        (["--max-tokens", "3"], "--max-tokens: '3' is not a whole number of at least 4"),
        (["--repetitions", "0"], "--repetitions: '0' is not a whole number of at least 1"),
        (["--temperature", "nan"], "--temperature: 'nan' is not a number from 0 to 2"),
        (["--scenario", "2x4", "--num-prompts", "2"], "--num-prompts and --prompt-tokens describe a scenario; "),
        (["--output", "no/such/folder.json"], "--output: there is no folder no/such"),
        (["--scenario", "1x9000"], "--scenario 1x9000: 9064 tokens with the output; the context has 8192"),
        (["--port", "1"], "unknown flag --port"),
    ],
)
def test_wrong_flag_is_one_line_and_code_2(
    model: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(model), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"vllm-mlx: error: {line}")


def test_interrupt_prints_what_was_measured(model: Path) -> None:
    arguments = ["--scenario", "2x8", "--scenario", "16x800", "--max-tokens", "500", "--warmup", "0"]
    command = [sys.executable, "-m", "vllm_mlx.cli.main", "bench", str(model), *arguments, "--repetitions", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not (line := process.stderr.readline()).startswith("measuring 16x800"):
            assert line, "the command ended"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert "2x8" in out
    assert "16x800" not in out


def test_settings_reach_the_engine(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--scenario", "1x8", "--max-tokens", "4", "--warmup", "0", "--format", "json"]
    assert main(["bench", str(model), *arguments, "--cache-memory-mb", "1", "--max-model-len", "100"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["max_model_len"] == 100
    assert (report["num_pages"] - 1) * 32 * 2 * 2 * 2 * 32 * 4 <= 1 << 20
    assert report["num_pages"] < Config().max_num_seqs
