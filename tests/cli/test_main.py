"""The command as a person meets it: help, version, and one line for whatever is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vllm_mlx
from vllm_mlx.cli.main import main
from vllm_mlx.cli.parser import COMMANDS
from vllm_mlx.cli.settings import settings

NAMES = ", ".join(command.name for command in COMMANDS)


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"vllm-mlx {vllm_mlx.__version__}\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    out = capsys.readouterr().out
    assert all(f"  {command.name} " in out for command in COMMANDS)


def test_without_a_command_help_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: vllm-mlx" in captured.err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_a_command_names_its_settings(
    command: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = next(c for c in COMMANDS if c is command)
    assert main([chosen.name, "--help"]) == 0
    out = capsys.readouterr().out
    assert [s.name for s in settings(chosen.groups) if s.flags[0] not in out] == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["serv"], f"vllm-mlx: error: unknown command 'serv' ({NAMES}); did you mean serve?"),
        (["--port", "1"], f"vllm-mlx: error: a command must come before flags ({NAMES})"),
        (["serve", "--port", "x"], "vllm-mlx: error: --port: 'x' is not a whole number"),
        (["serve", "--prot", "1"], "vllm-mlx: error: unknown flag --prot; did you mean --port?"),
        (["serve", "--rate-limit", "5"], "vllm-mlx: error: --rate-limit: not supported yet (rate limits)"),
        (["chat", "--port", "1"], "vllm-mlx: error: unknown flag --port"),
    ],
)
def test_wrong_command_line_is_one_line_and_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [line]


@pytest.mark.parametrize("command", ["serve", "chat", "bench", "download"])
@pytest.mark.parametrize("model", ["./no-such-folder", "no-such-model.gguf", "not a name"])
def test_unknown_model_is_one_line_and_code_2(
    command: str, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MLX_PORT", "0")
    assert main([command, model]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-mlx: error: {model}")


def test_broken_model_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{not json")
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-mlx: error: ")


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "vllm_mlx.cli.main", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"vllm-mlx {vllm_mlx.__version__}\n"
