"""Models from the Hugging Face hub, through huggingface_hub in a child process.

A child, because the library reads its timeouts once when it is imported, and because a child can be ended when no
byte arrives any more, wherever it hangs. Its token, endpoint and proxy settings (HF_TOKEN, HF_ENDPOINT, ...) apply.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ModelError
from vllm_mlx.core.step import ProgressCallback

PATTERNS = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
CODE_PATTERNS = ("*.py",)
START_TIMEOUT_S = 60.0
"""The child may take this long longer than a download's silence, to import what it needs."""


def download(config: Config, *, progress: ProgressCallback) -> Path:
    """The folder of `config.model` in the hub's own cache; only what is not there yet is downloaded.

    An interrupted download goes on where it stopped. Raises ModelError with the reason.
    """
    job = {
        "repo_id": config.model,
        "revision": config.revision,
        "local_files_only": config.offline,
        "allow_patterns": [*PATTERNS, *(CODE_PATTERNS if config.trust_remote_code else ())],
    }
    for attempt in range(config.download_retries + 1):
        outcome = _attempt(job, config, progress)
        if "path" in outcome:
            return Path(outcome["path"])
        if outcome["kind"] != "network" or attempt == config.download_retries:
            break
        progress(f"download of {config.model} broke off ({outcome['reason']}); trying again")
        time.sleep(min(2**attempt, 8))
    raise ModelError(_message(config, outcome))


def _attempt(job: dict[str, Any], config: Config, progress: ProgressCallback) -> dict[str, Any]:
    """Run the child once: {'path': ...} or {'kind': ..., 'reason': ...}."""
    environment = os.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": str(config.download_timeout)}
    environment.setdefault("HF_HUB_ETAG_TIMEOUT", str(min(config.download_timeout, 10)))
    command = [sys.executable, "-m", "vllm_mlx.models.hub_child", json.dumps(job)]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        )
        try:
            return _follow(child, errors, config, progress)
        finally:
            child.kill()
            child.wait()


def _follow(
    child: subprocess.Popen[str], errors: IO[bytes], config: Config, progress: ProgressCallback
) -> dict[str, Any]:
    """Pass on what the child reports until it ends, or until nothing new arrives for the time allowed."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(child, lines), daemon=True).start()
    patience_s = config.download_timeout + START_TIMEOUT_S
    while True:
        try:
            line = lines.get(timeout=patience_s)
        except queue.Empty:
            return {"kind": "network", "reason": f"no data for {config.download_timeout} s"}
        if line is None:
            return {"kind": "network", "reason": _last_line(errors)}
        report: dict[str, Any] = json.loads(line)
        if "done" not in report:
            return report
        patience_s = config.download_timeout
        _show(report, config.model, progress)


def _read_lines(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            lines.put(line)
    lines.put(None)


def _show(report: dict[str, Any], model: str, progress: ProgressCallback) -> None:
    done, total = report["done"], report["total"]
    text = f"downloading {model} ({done / 1e9:.2f} of {total / 1e9:.2f} GB)"
    progress(text, min(done / total, 1.0) if total else None)


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "the download ended without a reason"


def _message(config: Config, outcome: dict[str, Any]) -> str:
    model, reason = config.model, outcome.get("reason", "")
    revision = config.revision or "main"
    return {
        "not_found": f"{model}: there is no such model on the Hugging Face hub, or it is private; "
        "check the name, or set HF_TOKEN to a token that may read it.",
        "gated": f"{model}: is gated; accept its terms on the hub and set HF_TOKEN to a token of that account.",
        "token": f"{model}: the hub refuses the token; check HF_TOKEN or log in again with `hf auth login`.",
        "revision": f"{model}: has no revision {revision}; check --revision.",
        "offline": f"{model}: is not (completely) in the local cache, and the network may not be used; "
        "start once without --offline.",
        "disk": f"{model}: cannot be stored ({reason}); free some space, or set HF_HOME to another folder.",
        "network": f"{model}: cannot be downloaded ({reason}); check the network, and start again: "
        "what is already here is kept.",
    }[outcome["kind"]]
