"""Coding agents whose conversation outgrows the context: they compact it, and end their task.

The model is scripted: it reads one file after the other until it finds a summary in its prompt, and then edits one.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from agent_script import DONE, EDITORS, IDLE, READERS, AgentScript, functions_of, write_agent_model
from fixtures_server import LiveServer

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-agents"
TASK = "TASK-7421"
PROMPT = f"{TASK}: read all chapters, then change the greeting in notes.txt"
TIMEOUT_S = 400
NUM_CHAPTERS = 40
OLD, NEW = "hello", "goodbye"
SUMMARY = "SUMMARY-5512: the chapters are read; what is left is the greeting in notes.txt."
ASKS_FOR_SUMMARY = re.compile(r"create a (detailed|handoff|new anchored) summary|state_snapshot", re.IGNORECASE)
HEADLESS = {
    "opencode": ("run", PROMPT),
    "qwen": ("--yolo", "-p", PROMPT),
    "claude": ("-p", PROMPT, "--permission-mode", "acceptEdits"),
    "codex": ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", PROMPT),
}


class Reader(AgentScript):
    """Reads chapter after chapter until the conversation is a summary; then reads and edits the file of the task."""

    def __init__(self, backend: tokenizers.Tokenizer, *, chapters: Sequence[Path], notes: Path) -> None:
        super().__init__(backend, task=TASK, path=notes, old=OLD, new=NEW)
        self._chapters = chapters
        self._notes = notes
        self.num_summaries = 0

    def _say(self, prompt: str) -> str:
        tools = functions_of(prompt)
        if TASK not in prompt and SUMMARY not in prompt:
            return IDLE
        if ASKS_FOR_SUMMARY.search(prompt.rpartition("<|im_start|>user\n")[2]):
            self.num_summaries += 1
            return f"<summary>\n{TASK}. {SUMMARY}\n</summary>"
        if not tools:
            return IDLE
        num_results = prompt.count("<|im_start|>tool\n")
        self.turns.append((num_results, prompt[-300:]))
        if SUMMARY not in prompt:
            self.point_to(self._chapters[num_results])
            return self._call(tools, READERS, "read")
        self.point_to(self._notes)
        if NEW in self._notes.read_text():
            return DONE
        has_read = self._content in prompt.rpartition("<|im_start|>tool\n")[2]
        return self._call(tools, EDITORS if has_read else READERS, "edit" if has_read else "read")


def run(client: str, *, url: str, project: Path, home: Path, npm_bin: Path, knows_context: bool) -> Any:
    """The client as a user calls it; without `launch` it knows the address of the server and nothing else."""
    environment = {
        "HOME": str(home),
        "PWD": str(project),
        "PATH": f"{npm_bin}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "VLLM_MLX_API_KEY": KEY,
        "NO_COLOR": "1",
    }
    command = [sys.executable, "-m", "vllm_mlx.cli.main", "launch", client, "--url", url, "--"]
    if not knows_context:
        environment |= {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": KEY}
        environment |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
        command = [client]
    return subprocess.run(
        [*command, *HEADLESS[client]],
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("client", "knows_context"),
    [("claude", True), ("claude", False), ("codex", True), ("opencode", True), ("qwen", True)],
    ids=str,
)
def test_client_compacts_and_goes_on(
    client: str, knows_context: bool, npm_bin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = {name: tmp_path / name for name in ("model", "home", "project")}
    for folder in folders.values():
        folder.mkdir()
    notes = folders["project"] / "notes.txt"
    notes.write_text(f"Say {OLD} to the world.\n")
    text = (ROOT / "docs" / "structure.md").read_text()[:8000]
    chapters = [folders["project"] / f"chapter-{number}.txt" for number in range(NUM_CHAPTERS)]
    for number, chapter in enumerate(chapters):
        chapter.write_text(f"Chapter {number}.\n{text}")
    subprocess.run(["git", "init", "-q"], cwd=folders["project"], check=True)
    corpus = [path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))]
    backend = write_agent_model(folders["model"], corpus)
    script = Reader(backend, chapters=chapters, notes=notes)
    config = Config(model="/models/fake", served_model_name="org/coder", api_key=KEY)
    options = {"script": script, "vocab_size": backend.get_vocab_size(), "max_model_len": 65_536, "num_pages": 8192}
    with caplog.at_level(logging.INFO, logger="vllm_mlx"), LiveServer(folders["model"], config, **options) as server:
        ended = run(
            client,
            url=server.url,
            project=folders["project"],
            home=folders["home"],
            npm_bin=npm_bin,
            knows_context=knows_context,
        )
    asked = [record.fields for record in caplog.records if hasattr(record, "fields") and "status" in record.fields]
    story = f"{ended.stdout}\n{ended.stderr}\n{asked}\n{script.turns}\n{script.num_summaries}"
    assert ended.returncode == 0, story
    assert notes.read_text() == f"Say {NEW} to the world.\n", story
    assert DONE in ended.stdout, story
    assert script.num_summaries >= 1, story
    refused = [fields for fields in asked if fields["status"] == 400]
    assert bool(refused) is not knows_context, story
