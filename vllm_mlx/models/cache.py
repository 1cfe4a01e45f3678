"""Folders that are made once and kept: whole or not there at all, made by one process at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from vllm_mlx.core.errors import ModelError
from vllm_mlx.core.step import ProgressCallback
from vllm_mlx.models.folder import check_folder, is_whole

Build = Callable[[Path, Path], None]
"""Called with the folder to fill and a scratch folder that is removed afterwards."""


def make_once(cache: Path, name: str, build: Build, *, progress: ProgressCallback) -> Path:
    """The folder `cache/name`, made by `build` if it is not there or not whole.

    A folder appears under its name only when it is complete (rename). Processes that want the same folder wait
    for the one that makes it. Raises ModelError if the folder cannot be written or `build` makes no whole model.
    """
    final = cache / name
    if is_whole(final):
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _Turn(cache / f".{name}.lock", progress):
            if not is_whole(final):
                _make(final, build)
    except OSError as error:
        raise ModelError(
            f"{error.filename or cache}: cannot be written ({error.strerror or error}); "
            "free some space there, or choose another folder with --cache-dir."
        ) from error
    return final


def _make(final: Path, build: Build) -> None:
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    folder, scratch = partial / "model", partial / "scratch"
    try:
        folder.mkdir(parents=True)
        scratch.mkdir()
        build(folder, scratch)
        check_folder(folder)
        if final.exists():
            final.rename(partial / "broken")
        folder.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Turn:
    """A lock between processes that says so when it has to wait. The system frees it if its holder dies."""

    def __init__(self, path: Path, progress: ProgressCallback) -> None:
        from filelock import FileLock

        self._lock = FileLock(path)
        self._progress = progress

    def __enter__(self) -> None:
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._progress("waiting for another process that prepares this model")
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
