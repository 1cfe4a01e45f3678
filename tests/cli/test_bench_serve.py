"""`vllm-mlx bench-serve` as a person runs it, against our own app over a fake model."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixtures_server import LiveServer
from fixtures_text import WordScript, write_tokenizer
from scripted_server import CHUNKED, ScriptedServer, delta, words

from vllm_mlx.cli.bench_serve_flags import FLAGS
from vllm_mlx.cli.main import main
from vllm_mlx.core import log
from vllm_mlx.core.config import Config

MODEL = "org/fake-model"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Our server; its model writes words and never ends by itself."""
    folder = tmp_path_factory.mktemp("model")
    backend = write_tokenizer(folder)
    config = Config(model="/models/fake", served_model_name=MODEL, engine="thread")
    options = {"script": WordScript(backend), "vocab_size": backend.get_vocab_size(), "max_model_len": 2048}
    # its log shares this process's standard error with the command
    logger = logging.getLogger(log.ROOT)
    before, logger.handlers = logger.handlers, [logging.NullHandler()]
    with LiveServer(folder, config, **options) as server:
        yield server
    logger.handlers = before


@pytest.fixture
def bench(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command; returns exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["bench-serve", "--url", live.url, "--warmup", "0", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


SMALL = ("--prompt-words", "20", "--max-tokens", "8", "--repetitions", "2", "--concurrency", "1,3")


def test_table_is_the_default_and_nothing_else_is_printed(bench) -> None:
    code, out, err = bench(*SMALL)
    head, first, second, *counters = out.splitlines()
    assert (code, err) == (0, "")
    assert head.split()[:3] == ["prompt_set", "concurrency", "num_requests"]
    assert first.split()[:5] == ["20", "words", "1", "2", "0"]
    assert second.split()[:5] == ["20", "words", "3", "6", "0"]
    assert "server: vllm_mlx_generation_tokens_total +64" in counters


def test_json_has_true_token_counts_and_the_servers_facts(bench) -> None:
    code, out, _ = bench(*SMALL, "--format", "json", "--tag", "x", "--seed", "3", "--include-requests")
    found = json.loads(out)
    assert code == 0
    assert (found["kind"], found["complete"], found["tag"]) == ("vllm-mlx-bench-serve", True, "x")
    assert found["provenance"]["seed"] == 3
    assert [row["num_requests"] for row in found["rows"]] == [1, 1, 3, 3]
    for row in found["rows"]:
        assert (row["failures"], row["validated"], row["model_id"], row["engine_type"]) == (0, True, MODEL, "batched")
        assert (row["tokens_counted_by"], row["completion_tokens"]) == ("usage", 8)
        assert row["prompt_tokens"] > 20
        assert row["finish_reasons"] == {"length": row["num_requests"]}
        assert 0 < row["ttft_ms"] <= row["e2e_latency_ms"]
        assert row["metrics_delta"]["vllm_mlx_generation_tokens_total"] == 8 * row["num_requests"]
        assert row["tokens_saved"] is not None
        assert len(row["requests"]) == row["num_requests"]


def test_csv(bench) -> None:
    _, out, _ = bench(*SMALL, "--format", "csv", "--override-field", "chip=M9", "rack=7")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["concurrency"], row["repetition"], row["chip"], row["rack"]) for row in rows] == [
        (clients, repetition, "M9", "7") for clients in "13" for repetition in "12"
    ]


def test_sqlite_file_grows_with_every_run(bench, tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    for _ in range(2):
        code, out, err = bench(*SMALL, "--output", str(path))
        assert code == 0
        assert "prompt_set" in out
        assert err == f"results: {path}\n"
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*), count(DISTINCT run_id) FROM bench_serve").fetchone() == (8, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--endpoint", "completions"),
        ("--enable-thinking", "true,false"),
        ("--ignore-eos", "--extra-body", '{"top_k":1},{"top_p":0.5}', "--temperature", "0.7"),
        ("--request-rate", "200", "--num-requests", "5"),
        ("--request-rate", "inf", "--num-requests", "5"),
        ("--shared-prefix", "--prompts", "short"),
        ("--temperature", "server"),
    ],
)
def test_our_server_takes_what_every_flag_sends(bench, arguments: tuple[str, ...]) -> None:
    code, out, err = bench(
        "--prompt-words", "9", "--max-tokens", "3", "--repetitions", "1", "--format", "json", *arguments
    )
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [row["failure_kinds"] for row in found["rows"]] == [{}] * len(found["rows"])


def test_workload_is_checked_and_decides_the_exit_code(bench, tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    case = {"id": "a", "messages": [{"role": "user", "content": "Hi"}], "checks": {"finish_reason": "length"}}
    path.write_text(json.dumps({"name": "w", "cases": [case]}))
    code, out, err = bench("--workload", str(path), "--max-tokens", "5", "--concurrency", "4", "--repetitions", "2")
    assert (code, err) == (0, "vllm-mlx: note: --concurrency has no effect with --workload\n")
    assert [record["ok"] for record in json.loads(out)["records"]] == [True, True]
    case["checks"] = {"finish_reason": "stop"}
    path.write_text(json.dumps({"name": "w", "cases": [case]}))
    code, out, _ = bench("--workload", str(path), "--max-tokens", "5", "--format", "csv", "--repetitions", "1")
    [row] = csv.DictReader(io.StringIO(out))
    assert (code, row["quality_ok"], row["finish_reason"]) == (1, "False", "length")


def test_capacity_envelope_writes_its_artifact(bench, tmp_path: Path) -> None:
    path = tmp_path / "envelope.json"
    small = ("--capacity-prompt-tokens", "64", "--capacity-output-tokens", "3", "--capacity-concurrency", "1,2")
    code, out, _ = bench(
        "--capacity-envelope", *small, "--capacity-repetitions", "1", "--capacity-cache-modes", "cold",
        "--seed", "1", "--output", str(path),
    )  # fmt: skip
    assert code == 0
    assert out.count("sustainable") == 2
    cells = json.loads(path.read_text())["cells"]
    assert [cell["concurrency"] for cell in cells] == [1, 2]
    assert all(abs(cell["prompt_tokens"] - 64) <= 16 for cell in cells)


def test_compare_reads_two_results(bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    for path in (one, other):
        assert bench(*SMALL, "--output", str(path))[0] == 0
    assert main(["bench-serve", "compare", str(one), str(other)]) == 0
    out = capsys.readouterr().out
    assert "20 words, concurrency 3, max_tokens 8, endpoint chat" in out
    assert out.count("throughput_tps") == 2
    assert "only in" not in out


def test_key_is_sent_from_flag_or_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--prompts", "short", "--repetitions", "1", "--warmup", "0", "--concurrency", "1"]
    with ScriptedServer(lambda _: words("x")) as server:
        main(["bench-serve", "--url", server.url, *small, "--api-key", "one"])
        monkeypatch.setenv("VLLM_MLX_API_KEY", "two")
        main(["bench-serve", "--url", server.url, *small])
    keys = [request.headers["authorization"] for request in server.requests if request.method == "POST"]
    assert keys == ["Bearer one", "Bearer two"]


def test_unreachable_server_is_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-serve", "--url", "http://127.0.0.1:9"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "vllm-mlx: error: cannot reach http://127.0.0.1:9: connection refused\n"


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-serve", "--help"]) == 0
    out = capsys.readouterr().out
    assert [flag.name for flag in FLAGS if f"  {flag.name}" not in out] == []
    assert main(["bench-serve", "compare", "--help"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "1,0"], "--concurrency: '0' is less than 1"),
        (["--concurrency", ""], "--concurrency: needs at least one value"),
        (["--request-rate", "0"], "--request-rate: '0' is not greater than 0 (or inf)"),
        (["--prompt-mix", "2x"], "--prompt-mix: '2x' is not COUNTxWORDS, such as 30x100"),
        (["--enable-thinking", "maybe"], "--enable-thinking: 'maybe' is neither true nor false"),
        (["--extra-body", "{"], "--extra-body: '{' is not one or more JSON objects with commas between"),
        (["--override-field", "chip"], "--override-field: 'chip' is not key=value"),
        (["--format", "xml"], "--format: 'xml' is not one of auto, table, json, csv, sql, sqlite"),
        (["--format", "sqlite"], "--format sqlite: needs --output FILE"),
        (["--url", "ftp://x"], "--url: 'ftp://x' is not an http:// or https:// address"),
        (["--concurency", "1"], "unknown flag --concurency; did you mean --concurrency?"),
        (["extra"], "unexpected argument 'extra'"),
        (["--workload", "none.json"], "--workload: none.json is no file"),
        (["--prompts", "shrot"], "--prompts: shrot is no file, and no prompt set (short, medium, long, thinking)"),
        (["--system-prompt-file", "none.txt"], "--system-prompt-file: none.txt cannot be read"),
        (["--workload", "x", "--capacity-envelope"], "--workload: cannot be combined with --capacity-envelope"),
        (
            ["--capacity-envelope", "--enable-thinking", "true,false"],
            "--enable-thinking: takes one value with --capacity-envelope",
        ),
        (["--capacity-max-failure-rate", "2"], "--capacity-max-failure-rate: '2' is not between 0 and 1"),
        (["compare", "a.json"], "the following arguments are required: B.json"),
        (["compare", "a.json", "b.json"], "compare: a.json is no file"),
    ],
)
def test_wrong_flag_is_one_line_that_names_it(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench-serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith(f"vllm-mlx: error: {message}")


def test_interrupted_run_prints_what_it_measured(tmp_path: Path) -> None:
    answered: list[Any] = []

    def script(request: Any) -> list[Any]:
        answered.append(request)
        return words("a", "b") if len(answered) <= 5 else [CHUNKED, delta(content="a"), 60.0]

    with ScriptedServer(script) as server:
        command = [sys.executable, "-m", "vllm_mlx.cli.main", "bench-serve", "--url", server.url, "--format", "json"]
        more = ["--prompt-words", "5", "--concurrency", "1", "--num-requests", "3", "--warmup", "0"]
        process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(answered) < 6:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    found = json.loads(out)
    assert (process.returncode, err) == (130, "")
    assert found["complete"] is False
    assert [(row["num_requests"], row["complete"]) for row in found["rows"]] == [(3, True), (2, False)]
    assert found["summary"][0]["num_requests"] == 5


def test_results_are_printed_where_the_file_cannot_be_written(
    bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()

    def vanish(*_: Any) -> None:
        (folder / "x.json").unlink(missing_ok=True)
        folder.rmdir()

    monkeypatch.setattr("vllm_mlx.bench.output.check_output", vanish)
    code, out, err = bench(*SMALL, "--output", str(folder / "x.json"))
    assert code == 1
    assert json.loads(out)["complete"] is True
    assert err.startswith(f"vllm-mlx: error: --output: {folder}/x.json cannot be written: ")
