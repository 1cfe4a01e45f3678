"""A cached folder is whole or absent, and made by one process at a time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_mlx.core.errors import ModelError
from vllm_mlx.models.cache import make_once

Quiet = Callable[..., None]

RACE = """
import shutil, sys, time
from pathlib import Path
from vllm_mlx.models.cache import make_once

source, cache, log = map(Path, sys.argv[1:])

def build(folder, scratch):
    with log.open("a") as file:
        file.write("built\\n")
    for path in source.iterdir():
        shutil.copy(path, folder)
        time.sleep(0.2)

print(make_once(cache, "m", build, progress=lambda text, fraction=None: print(text)))
"""


def copying(source: Path) -> Callable[[Path, Path], None]:
    def build(folder: Path, scratch: Path) -> None:
        assert scratch.is_dir()
        for path in source.iterdir():
            shutil.copy(path, folder)

    return build


def never(folder: Path, scratch: Path) -> None:
    raise AssertionError("built again")


def test_folder_is_made_once(model_folder: Path, tmp_path: Path, quiet: Quiet) -> None:
    cache = tmp_path / "deep" / "cache"
    made = make_once(cache, "m", copying(model_folder), progress=quiet)
    assert {path.name for path in made.iterdir()} == {path.name for path in model_folder.iterdir()}
    assert make_once(cache, "m", never, progress=quiet) == made
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["m"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_folder_is_made_again(model_folder: Path, tmp_path: Path, quiet: Quiet, name: str) -> None:
    made = make_once(tmp_path / "cache", "m", copying(model_folder), progress=quiet)
    (made / name).write_bytes(b"")
    (made / "old").touch()
    make_once(tmp_path / "cache", "m", copying(model_folder), progress=quiet)
    assert (made / name).read_bytes() == (model_folder / name).read_bytes()
    assert not (made / "old").exists()


def test_half_made_folder_is_never_used(model_folder: Path, tmp_path: Path, quiet: Quiet) -> None:
    """What a killed process leaves behind."""
    left = tmp_path / "cache" / ".m.partial" / "model"
    shutil.copytree(model_folder, left)
    (left / "stale").touch()
    made = make_once(tmp_path / "cache", "m", copying(model_folder), progress=quiet)
    assert not (made / "stale").exists()
    assert not left.exists()


def test_build_that_makes_no_model_fails(tmp_path: Path, quiet: Quiet) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        make_once(tmp_path / "cache", "m", lambda folder, scratch: None, progress=quiet)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_folder_that_cannot_be_written_is_named(tmp_path: Path, quiet: Quiet) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"file.*--cache-dir"):
        make_once(tmp_path / "file" / "cache", "m", never, progress=quiet)


def test_processes_that_start_together_build_once(model_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", RACE, str(model_folder), str(tmp_path / "cache"), str(log)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert log.read_text() == "built\n"
    assert {lines[-1] for lines in said} == {str(tmp_path / "cache" / "m")}


def test_lock_of_a_killed_process_is_free(model_folder: Path, tmp_path: Path, quiet: Quiet) -> None:
    hang = RACE.replace("time.sleep(0.2)", "print('in', flush=True); time.sleep(600)")
    command = [sys.executable, "-c", hang, str(model_folder), str(tmp_path / "cache"), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in\n"
        child.kill()
    made = make_once(tmp_path / "cache", "m", copying(model_folder), progress=quiet)
    assert (made / "config.json").exists()
