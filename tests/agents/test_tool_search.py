"""Claude Code with a server of many tools: it looks the one up that it needs, and calls it.

The model is scripted; the tools' descriptions are not in its prompt until it has looked for them.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import many_tools
import pytest
import tokenizers
from agent_script import DONE, IDLE, AgentScript, functions_of, write_agent_model
from fixtures_server import LiveServer

from vllm_mlx.core.config import Config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-agents"
TASK = "TASK-7421"
PROMPT = f"{TASK}: change the greeting in notes.txt"
TOOL = f"mcp__world__{many_tools.WANTED}"
TIMEOUT_S = 200


class Searcher(AgentScript):
    """Looks the tool up, calls it, and says that it is done."""

    def __init__(self, backend: tokenizers.Tokenizer, *, notes: Path) -> None:
        super().__init__(backend, task=TASK, path=notes, old="hello", new="goodbye")
        self.prompts: list[str] = []

    def _say(self, prompt: str) -> str:
        tools = functions_of(prompt)
        if not tools or TASK not in prompt:
            return IDLE
        self.prompts.append(prompt)
        if prompt.count("<|im_start|>tool\n") == 2:
            return DONE
        if f'"name": "{TOOL}"' in prompt:
            call = {"name": TOOL, "arguments": {"path": self._values["path"]}}
        elif "ToolSearch" not in tools:
            return f"No search is offered, only {sorted(tools)}."
        else:
            call = {"name": "ToolSearch", "arguments": {"query": f"select:{TOOL}", "max_results": 5}}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def test_claude_code_looks_a_tool_up(npm_bin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = {name: tmp_path / name for name in ("model", "home", "project")}
    for folder in folders.values():
        folder.mkdir()
    notes = folders["project"] / "notes.txt"
    notes.write_text("Say hello to the world.\n")
    server = {"command": sys.executable, "args": [str(many_tools.__file__)]}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"world": server}}))
    backend = write_agent_model(folders["model"], [path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))])
    script = Searcher(backend, notes=notes)
    config = Config(model="/models/fake", served_model_name="org/coder", api_key=KEY)
    options = {"script": script, "vocab_size": backend.get_vocab_size(), "max_model_len": 131_072, "num_pages": 8192}
    flags = ["--mcp-config", str(tmp_path / "mcp.json"), "--allowedTools", TOOL]
    with caplog.at_level(logging.INFO, logger="vllm_mlx"), LiveServer(folders["model"], config, **options) as live:
        launch = [sys.executable, "-m", "vllm_mlx.cli.main", "launch", "claude", "--url", live.url, "--"]
        ended = subprocess.run(
            [*launch, "-p", PROMPT, *flags],
            cwd=folders["project"],
            env={
                "HOME": str(folders["home"]),
                "PATH": f"{npm_bin}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "VLLM_MLX_API_KEY": KEY,
                "MCP_CONNECTION_NONBLOCKING": "0",  # its first request waits for the tools
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    asked = [record.fields for record in caplog.records if hasattr(record, "fields") and "status" in record.fields]
    story = f"{ended.stdout}\n{ended.stderr}\n{asked}\n{[prompt[-600:] for prompt in script.prompts]}"
    assert ended.returncode == 0, story
    assert notes.read_text() == "Say goodbye to the world.\n", story
    assert DONE in ended.stdout, story
    assert all(fields["status"] == 200 for fields in asked), story
    assert len(script.prompts) == 3, story
    assert "one of many" not in script.prompts[0], story
    assert script.prompts[1].count("one of many") == 12, story
