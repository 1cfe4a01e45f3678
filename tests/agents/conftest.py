"""The clients themselves, from npm, and a server that a scripted model stands behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

PACKAGES = {
    "@anthropic-ai/claude-code": "2.1.330",
    "@openai/codex": "0.169.0",
    "@qwen-code/qwen-code": "0.24.4",
    "cline": "3.0.65",
    "opencode-ai": "1.18.33",
}
INSTALL_TIMEOUT_S = 900


@pytest.fixture(scope="session")
def npm_bin() -> Path:
    """Folder of the clients' executables; installed once and kept in the user's cache."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder = Path.home() / ".cache" / "vllm-mlx-tests" / "agents"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.dumps({"private": True, "dependencies": PACKAGES}, indent=2)
    with FileLock(folder / "lock"):
        done = folder / "installed.json"
        if not done.exists() or done.read_text() != wanted:
            (folder / "package.json").write_text(wanted)
            command = [npm, "install", "--no-audit", "--no-fund", "--loglevel=error"]
            found = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
            )
            if found.returncode != 0:
                pytest.skip(f"npm could not install the clients: {found.stderr.strip()[-300:]}")
            done.write_text(wanted)
    return folder / "node_modules" / ".bin"
