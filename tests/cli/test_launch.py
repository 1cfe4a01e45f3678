"""`vllm-mlx launch` and `vllm-mlx connect`, with programs that stand in for the clients."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_server import ScriptedServer

from vllm_mlx.cli.client import NO_KEY, Client, Target, set_up
from vllm_mlx.cli.clients import clients
from vllm_mlx.cli.main import main
from vllm_mlx.cli.parser import COMMANDS, parse
from vllm_mlx.cli.settings import arguments_of, make_config
from vllm_mlx.core.config import Config

TARGET = Target("http://127.0.0.1:9999", 'org/a "model"', 65_536, "sk-1")
EVERY = pytest.mark.parametrize("client", clients().values(), ids=lambda client: client.name)
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
config = os.environ.get("OPENCODE_CONFIG")
print(json.dumps({{
    "arguments": sys.argv[1:],
    "environment": dict(os.environ),
    "config": json.loads(pathlib.Path(config).read_text()) if config else None,
}}))
sys.exit(7)
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with programs under the clients' names; they tell what they were given, and fail."""
    for client in clients().values():
        path = tmp_path / client.executable
        path.write_text(STAND_IN)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: [], {}) as found:
        found.pages["/v1/models"] = (200, {"data": [{"id": "org/served", "max_model_len": 40_000}]})
        yield found


@pytest.fixture
def unused_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@EVERY
def test_every_text_of_a_client_is_filled_in(client: Client, tmp_path: Path) -> None:
    setup = set_up(client, TARGET, folder=tmp_path)
    texts = [*setup.command, *setup.environment.values(), *setup.files.values()]
    assert not any(re.search(r"\$(?!schema)\w", text) for text in texts)
    everything = "\n".join([*texts, *(json.dumps(json.loads(text)) for text in setup.files.values())])
    assert TARGET.url in everything
    assert "65536" in everything or "49152" in everything  # with or without room for an answer
    assert "sk-1" in everything
    assert NO_KEY not in everything
    assert NO_KEY in str(set_up(client, Target(TARGET.url, "m", 9), folder=tmp_path))
    assert all(path.is_relative_to(tmp_path) for path in setup.files)


@EVERY
def test_connect_prints_a_script_that_runs_the_client(
    client: Client, stand_ins: Path, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["connect", client.name, "--url", f"{server.url}/v1/"]) == 0
    script = capsys.readouterr().out
    environment = {"PATH": f"{stand_ins}:/usr/bin:/bin", "ANTHROPIC_API_KEY": "theirs"}
    ended = subprocess.run(["sh"], input=script, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (7, "")
    told = json.loads(ended.stdout)
    setup = set_up(client, Target(server.url, "org/served", 40_000), folder=Path("/nowhere"))
    assert told["environment"].keys() >= setup.environment.keys()
    assert len(told["arguments"]) == len(setup.command) - 1
    assert not set(client.unset) & told["environment"].keys()


def test_launch_runs_the_client_and_returns_its_code(
    stand_ins: Path, server: ScriptedServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MLX_API_KEY", "sk-2")
    assert main(["launch", "opencode", "--url", server.url, "--", "run", "--model", "x", "do it"]) == 7
    told = json.loads(capfd.readouterr().out)
    assert told["arguments"] == ["run", "--model", "x", "do it"]
    assert told["environment"]["VLLM_MLX_API_KEY"] == "sk-2"
    provider = told["config"]["provider"]["vllm-mlx"]
    assert provider["options"]["baseURL"] == f"{server.url}/v1"
    assert provider["models"]["org/served"]["limit"] == {"context": 40_000, "input": 30_000, "output": 10_000}
    assert not Path(told["environment"]["OPENCODE_CONFIG"]).exists()
    assert server.requests[0].headers["authorization"] == "Bearer sk-2"


CATALOGUE = {
    "models": [
        {"slug": "special", "tool_mode": "code_mode_only", "base_instructions": "Write code."},
        {"slug": "plain", "tool_mode": None, "base_instructions": "Pay $5.", "newer_field": 1, "context_window": 9},
    ]
}


def codex_that_prints(text: str, folder: Path) -> None:
    """A program under Codex's name that tells its catalogue; else it tells its arguments, and that catalogue's file."""
    (folder / "codex").write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "if sys.argv[1] == 'debug':\n"
        f"    print({text!r})\n"
        "else:\n"
        "    found = [a.partition('=')[2] for a in sys.argv if a.startswith('model_catalog_json=')]\n"
        "    texts = [pathlib.Path(json.loads(path)).read_text() for path in found]\n"
        "    print(json.dumps([sys.argv[1:], *texts]))\n"
    )


def test_codex_gets_its_own_catalogue_with_the_served_model(
    stand_ins: Path, server: ScriptedServer, capfd: pytest.CaptureFixture[str]
) -> None:
    codex_that_prints(json.dumps(CATALOGUE), stand_ins)
    assert main(["launch", "codex", "--url", server.url]) == 0
    arguments, text = json.loads(capfd.readouterr().out)
    (model,) = json.loads(text)["models"]
    assert (model["slug"], model["context_window"], model["max_context_window"]) == ("org/served", 40_000, 40_000)
    assert (model["base_instructions"], model["newer_field"]) == ("Pay $5.", 1)
    assert (model["apply_patch_tool_type"], model["auto_compact_token_limit"]) == ("freeform", 32_000)
    assert "model_auto_compact_token_limit=32000" in arguments
    assert "tool_output_token_limit=5000" in arguments


@pytest.mark.parametrize("told", ["", "[]", "{}", '{"models": 1}', '{"models": [{"tool_mode": "x"}, "x"]}'])
def test_codex_that_tells_no_catalogue_runs_without(
    told: str, stand_ins: Path, server: ScriptedServer, capfd: pytest.CaptureFixture[str]
) -> None:
    codex_that_prints(told, stand_ins)
    assert main(["launch", "codex", "--url", server.url]) == 0
    (arguments,) = json.loads(capfd.readouterr().out)
    assert "model_context_window=40000" in arguments


def test_context_that_is_too_short_for_a_client_is_told(
    stand_ins: Path, server: ScriptedServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.pages["/v1/models"] = (200, {"data": [{"id": "org/served", "max_model_len": 8192}]})
    assert main(["launch", "claude", "--url", server.url]) == 7
    assert "Claude Code needs about" in capfd.readouterr().err
    assert main(["connect", "opencode", "--url", server.url]) == 0


def test_answers_are_as_long_as_the_server_allows() -> None:
    assert Target("u", "m", 40_000).output_tokens == 10_000
    assert Target("u", "m", 40_000, None, 4_000).output_tokens == 4_000
    assert Target("u", "m", 1_000_000).output_tokens == 32_768


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch", "codx"], "unknown client 'codx'.*did you mean codex"),
        (["launch", "codex", "--url", "ftp://x"], "--url: 'ftp://x' is not an http"),
        (["launch", "codex", "--url", "http://127.0.0.1:9"], r"nothing answers at http://127.0.0.1:9 \(conn"),
        (["launch", "codex", "--port", "9"], "start one with `vllm-mlx serve MODEL`, or give --model"),
        (["connect", "codex", "--port", "9"], "start a server first: vllm-mlx serve MODEL"),
    ],
)
def test_what_is_wrong_is_told(
    arguments: list[str], message: str, stand_ins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_client_is_told_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "claude"]) == 2
    assert "try: npm install -g @anthropic-ai/claude-code" in capsys.readouterr().err


def test_another_model_at_the_address_is_not_taken(
    stand_ins: Path, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    port = server.url.rpartition(":")[2]
    assert main(["launch", "codex", "org/other", "--port", port]) == 2
    assert "serves 'org/served'; leave --model out to use it" in capsys.readouterr().err
    assert main(["launch", "codex", "org/served", "--port", port]) == 7


@pytest.mark.parametrize(("status", "message"), [(401, "wants another API key"), (200, "without a model")])
def test_server_that_cannot_be_used_is_told(
    status: int, message: str, stand_ins: Path, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.pages["/v1/models"] = (status, {"data": []})
    assert main(["launch", "codex", "--url", server.url]) == 2
    assert message in capsys.readouterr().err


def test_settings_go_on_to_the_server_that_is_started() -> None:
    given = ["demo", "--port", "9", "--no-prefix-cache", "--model-alias", "a*", "--model-alias", "b=demo"]
    serve = COMMANDS[0]
    config = make_config(vars(parse(serve, [*given, "--default-chat-template-kwargs", '{"a": 1}'])), {})
    assert make_config(vars(parse(serve, arguments_of(config))), {}) == config
    assert arguments_of(Config()) == []
    assert arguments_of(Config(api_key="sk-secret")) == []


@pytest.mark.slow
def test_server_is_started_for_the_client_and_stopped_afterwards(
    stand_ins: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    monkeypatch.setenv("PATH", f"{stand_ins}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert main(["launch", "opencode", "demo", "--port", str(unused_port), "--max-model-len", "2048"]) == 7
    told = json.loads(capfd.readouterr().out)
    assert told["config"]["provider"]["vllm-mlx"]["models"] == {
        "demo": {"name": "demo", "limit": {"context": 2048, "input": 1536, "output": 512}}
    }
    assert main(["connect", "opencode", "--port", str(unused_port)]) == 2
