"""The emulator as the tests get it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from runner.metal.emulator import Emulator
from runner.metal.toolchain import Toolchain, find_compiler

KEEP_DAYS = 7


def emulator_for_tests(config: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """An emulator whose programs outlive the test run. Skips where no C++ compiler is."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler ($CXX, c++, g++ or clang++) to compile Metal's text with")
    cache = getattr(config, "cache", None)
    folder = cache.mkdir("metal") if cache is not None else tmp_path_factory.mktemp("metal")
    remove_old(folder)
    return Emulator(Toolchain(compiler, folder))


def remove_old(folder: Path) -> None:
    """What was made of texts that nobody used for days."""
    oldest = time.time() - KEEP_DAYS * 24 * 3600
    for path in folder.iterdir():
        if path.stat().st_mtime >= oldest:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
