"""`vllm-mlx doctor`: on this machine as it is, and on a GPU whose kernels are emulated."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from runner.metal.stand_in import MetalStandIn
from runner.metal.support import emulator_for_tests

import vllm_mlx
from vllm_mlx.cli import doctor as command
from vllm_mlx.cli.doctor_host import Disk, Host, examine_host
from vllm_mlx.cli.main import main
from vllm_mlx.core.config import Config
from vllm_mlx.runner import doctor
from vllm_mlx.runner.doctor import DeviceReport, ModelReport
from vllm_mlx.runner.kernels import source
from vllm_mlx.runner.kernels.bandwidth import Effort
from vllm_mlx.runner.kernels.variant import DecodeVariant

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120.0
GPU = DeviceReport("metal", "Emulated GPU", 1 << 30, 2 << 30, 1e9, None)
CPU = DeviceReport("cpu", "Some CPU", 1 << 30, 1 << 30, 1e9, "some BLAS")
QUICK = Effort(num_calls=2, num_rounds=1, min_bytes=1)


def variant(**changes: Any) -> DecodeVariant:
    fields: dict[str, Any] = {"key_dim": 32, "value_dim": 32, "heads": 2, "kv_heads": 1, "dtype": "float32"}
    return DecodeVariant(**(fields | {"page_size": 32, "scale": 0.2} | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    script = [sys.executable, str(ROOT / "benchmarks" / "random_model.py"), "tiny", str(folder)]
    subprocess.run(script, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
    return folder


@pytest.fixture
def gpu(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> MetalStandIn:
    """A GPU whose kernels are emulated; few and small ones are tried."""
    stand_in = MetalStandIn(emulator_for_tests(pytestconfig, tmp_path_factory), in_place={"key_pool", "value_pool"})
    monkeypatch.setattr(mx.fast, "metal_kernel", stand_in)
    monkeypatch.setattr(doctor, "examine_device", lambda: GPU)
    monkeypatch.setattr(doctor, "common_variants", lambda: (variant(), variant(window=100, has_sinks=True)))
    monkeypatch.setattr(doctor, "COMMON_HEADS", ((32, 4, 2, None),))
    quick = functools.partial(doctor.examine_kernels, effort=QUICK, call_bytes=1)
    monkeypatch.setattr(doctor, "examine_kernels", quick)
    return stand_in


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_mlx.cli.main", "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="there is a GPU")
def test_machine_without_a_gpu_is_well(model: Path) -> None:
    done = run(str(model), "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["host"]["versions"]["vllm-mlx"] == vllm_mlx.__version__
    assert report["host"]["versions"]["mlx"]
    assert report["device"]["backend"] == "cpu"
    assert report["device"]["copy_bytes_per_s"] > 1e8
    assert report["model"]["layers"] == {"in pages": 2}
    assert [found["heads"] for found in report["model"]["variants"]] == [4]
    assert report["kernels"] == []
    assert "pages that are gathered" in report["no_kernels"]
    assert "inspecting the model" in done.stderr


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="there is a GPU")
def test_table_says_what_may_go_wrong(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(VLLM_MLX_PORT=port, HF_HUB_CACHE=str(tmp_path / "not" / "yet"))
    assert done.returncode == 0, done.stderr
    lines = dict(re.split(r"\s+", line, maxsplit=1) for line in done.stdout.splitlines())
    assert lines["Port"] == f"127.0.0.1:{port} is not free"
    assert f"{port} is already in use" in lines["Warning"]
    assert lines["Device"].startswith("cpu (")
    assert "no GPU" in lines["Kernels"]
    assert "Model" not in lines
    assert str(tmp_path / "not" / "yet") in done.stdout


def test_kernels_are_tried_and_measured(gpu: MetalStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    lines = [line.split("  ") for line in captured.out.splitlines() if line.lstrip().startswith("decode 32")]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert [line[:2] for line in cells] == [
        ["decode 32, 2/1 heads, float32", "yes"],
        ["decode 32, 2/1 heads, float32, window 100, sinks", "yes"],
    ]
    for line in cells:
        assert 0 < float(line[2]) < 1e-5
        assert line[3].endswith("GB/s")
        assert line[4].endswith("%")
    assert "trying kernels 50%" in captured.err
    assert gpu.num_launches > 0


def test_failed_kernel_is_named_and_ends_with_code_1(
    gpu: MetalStandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "#if HAS_SINKS" in source.COMBINE_BODY
    monkeypatch.setattr(source, "COMBINE_BODY", source.COMBINE_BODY.replace("#if HAS_SINKS", "#if 0"))
    assert main(["doctor", "--format", "json"]) == 1
    report = json.loads(capsys.readouterr().out)
    right, wrong, heads = report["kernels"]
    assert (right["live"], right["problem"], wrong["live"], wrong["bytes_per_s"]) == (True, None, False, None)
    assert (heads["name"], heads["live"]) == ("heads 32, 4/2 heads, bfloat16", True)
    assert right["share_of_copy"] == pytest.approx(right["bytes_per_s"] / 1e9)
    assert wrong["error"] > 1e-3
    assert report["exit_code"] == 1
    assert main(["doctor"]) == 1
    assert f"{wrong['name']}: not used: {wrong['problem']}" in capsys.readouterr().out


def test_kernels_of_a_model_are_those_that_it_needs(
    gpu: MetalStandIn, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(model), "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [kernel["name"] for kernel in report["kernels"]] == ["decode 32, 4/2 heads, float32"]


def test_kernel_that_cannot_be_measured_is_live(gpu: MetalStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(doctor, "decode_bandwidth", fail)
    [report] = doctor.examine_kernels((variant(),), GPU, progress=lambda *_: None)
    assert (report.live, report.bytes_per_s, report.note) == (True, None, "out of memory")


def test_variants_are_measured_on_calls_of_similar_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(doctor, "decode_bandwidth", lambda one, lengths, *_, **__: asked.append(lengths))
    for one in doctor.common_variants():
        doctor.measure_decode(one, backend="metal", effort=QUICK, call_bytes=doctor.CALL_BYTES)
        lengths, size = asked.pop(), 4 if one.dtype == "float32" else 2
        token_bytes = one.kv_heads * (one.key_dim + one.value_dim) * size
        read = sum(min(length, one.window or length) for length in lengths) * token_bytes
        held = sum(lengths) * token_bytes
        assert doctor.CALL_BYTES / 2 <= read <= held <= 1.3 * doctor.CALL_BYTES, one


@pytest.mark.parametrize("has_mask", [True, False])
def test_gpu_without_need_of_kernels_says_why(has_mask: bool) -> None:
    host = examine_host(Config(port=0))
    report = command.Report(host, GPU, model=ModelReport({"in rows": 2}, has_mask, ()))
    assert report.exit_code == 0
    assert report.no_kernels == (command.HAS_MASK if has_mask else command.NO_PAGES)


def test_mlx_that_cannot_be_imported_is_reported() -> None:
    code = "import sys; sys.modules['mlx.core'] = None; from vllm_mlx.cli.main import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert "Versions" in done.stdout
    assert "MLX does not work here: " in done.stdout
    assert "Traceback" not in done.stderr


def test_mlx_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, vllm_mlx.cli.doctor as d; from vllm_mlx.core.config import Config\n"
        "d.examine_host(Config(port=0)); print('mlx.core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    assert done.stdout == "False\n"


def test_unknown_model_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "./no-such-folder"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("vllm-mlx: error: ./no-such-folder")


def test_limits_and_little_room_are_warned_of() -> None:
    host = Host({}, 256, 1 << 30, (Disk("models", "/models", 1 << 30),), "here:1", None, False)
    files, memory, disk = host.warnings()
    assert "ulimit -n" in files
    assert "ulimit -v" in memory
    assert disk == "little room for models in /models: 1.0 GiB"
    fine = Host({}, None, None, (Disk("models", "/models", 1 << 40),), "here:1", None, False)
    assert fine.warnings() == []


def test_limit_of_open_files_is_the_one_that_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (300, 9000))
    assert examine_host(Config(port=0)).open_files == 300


def test_unused_nvidia_gpu_is_pointed_out() -> None:
    host = Host({}, None, None, (), "here:1", None, has_nvidia_driver=True)
    assert command.Report(host, CPU).warnings() == [command.NVIDIA_UNUSED]
    assert command.Report(host, GPU).warnings() == []
