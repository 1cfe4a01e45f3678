"""Coding agents from npm, headless, each with a task of two tool calls: read a file, edit it.

The model is scripted; what is tried is all between it and the file: launcher, HTTP, template, parser, events, cache.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agent_script import DONE, AgentScript, write_agent_model
from fixtures_server import LiveServer

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-agents"
TASK = "TASK-7421"
PROMPT = f"{TASK}: change the greeting in notes.txt"
TIMEOUT_S = 240
HEADLESS = {
    "claude": ("-p", PROMPT, "--permission-mode", "acceptEdits"),
    "cline": ("--auto-approve", "true", PROMPT),
    "codex": ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", PROMPT),
    "opencode": ("run", PROMPT),
    "qwen": ("--yolo", "-p", PROMPT),
}


def run(client: str, *arguments: str, url: str, project: Path, home: Path, npm_bin: Path) -> Any:
    """`vllm-mlx launch` as a user calls it, in a project, with an empty home."""
    environment = {
        "HOME": str(home),
        "PWD": str(project),
        "PATH": f"{npm_bin}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "VLLM_MLX_API_KEY": KEY,
        "NO_COLOR": "1",
    }
    command = [sys.executable, "-m", "vllm_mlx.cli.main", "launch", client, "--url", url, "--", *arguments]
    return subprocess.run(
        command,
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("client", list(HEADLESS))
def test_client_reads_and_edits_a_file(
    client: str, npm_bin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = {name: tmp_path / name for name in ("model", "home", "project")}
    for folder in folders.values():
        folder.mkdir()
    notes = folders["project"] / "notes.txt"
    notes.write_text("Say hello to the world.\n")
    subprocess.run(["git", "init", "-q"], cwd=folders["project"], check=True)
    corpus = [path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))]
    backend = write_agent_model(folders["model"], corpus)
    script = AgentScript(backend, task=TASK, path=notes, old="hello", new="goodbye")
    config = Config(model="/models/fake", served_model_name="org/coder", api_key=KEY)
    options = {"script": script, "vocab_size": backend.get_vocab_size(), "max_model_len": 131_072, "num_pages": 8192}
    with caplog.at_level(logging.INFO, logger="vllm_mlx"), LiveServer(folders["model"], config, **options) as server:
        ended = run(
            client,
            *HEADLESS[client],
            url=server.url,
            project=folders["project"],
            home=folders["home"],
            npm_bin=npm_bin,
        )
    story = f"{ended.stdout}\n{ended.stderr}\n{caplog.text}\n{script.turns}"
    assert ended.returncode == 0, story
    assert notes.read_text() == "Say goodbye to the world.\n", story
    assert DONE in ended.stdout, story
    assert [number for number, _ in script.turns] == [0, 1, 2], story
    asked = [record.fields for record in caplog.records if hasattr(record, "fields") and "tokens_in" in record.fields]
    assert all(fields["status"] == 200 for fields in asked), story
    # the last two requests are the turns that follow a tool call
    assert all(fields["cached"] >= 0.95 * fields["tokens_in"] for fields in asked[-2:]), story
