"""Every kind of model argument goes the right way, and a wrong one gets one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ModelError
from vllm_mlx.models.resolve import resolve

Quiet = Callable[..., None]


def refused(name: str, quiet: Quiet, **settings: object) -> str:
    with pytest.raises(ModelError) as raised:
        resolve(Config(model=name, **settings), progress=quiet)  # type: ignore[arg-type]
    assert "\n" not in raised.value.message
    return raised.value.message


def test_local_folder_is_taken_as_it_is(model_folder: Path, quiet: Quiet) -> None:
    files = resolve(Config(model=str(model_folder)), progress=quiet)
    assert (files.path, files.name, files.source) == (model_folder, str(model_folder), "local")


def test_relative_folder_with_a_slash_is_not_a_hub_id(
    model_folder: Path, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent.parent)
    name = f"{model_folder.parent.name}/model"
    assert resolve(Config(model=name), progress=quiet).source == "local"


def test_home_is_expanded(model_folder: Path, quiet: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert resolve(Config(model="~/model"), progress=quiet).path == model_folder


@pytest.mark.parametrize("name", ["./gone", "../gone", "/gone/model", "~/gone", "owner/gone.gguf", "gone.gguf", "a/b/"])
def test_path_that_does_not_exist_is_not_asked_for_at_the_hub(name: str, quiet: Quiet) -> None:
    message = refused(name, quiet)
    assert name in message
    assert "no such file or folder" in message


@pytest.mark.parametrize("name", ["gone", "a/b/c", "owner/", "owner/na me", "x" * 5000, "nul\0"])
def test_argument_of_no_kind_is_refused(name: str, quiet: Quiet) -> None:
    refused(name, quiet)


def test_file_that_is_not_gguf_is_refused(tmp_path: Path, quiet: Quiet) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"abc")
    assert "not GGUF" in refused(str(path), quiet)


def test_revision_is_for_the_hub_only(model_folder: Path, quiet: Quiet) -> None:
    assert "--revision" in refused(str(model_folder), quiet, revision="v2")


def test_broken_folder_is_refused(model_folder: Path, quiet: Quiet) -> None:
    (model_folder / "model.safetensors").unlink()
    assert "model*.safetensors" in refused(str(model_folder), quiet)


def test_gguf_file_is_converted_once(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    path = make_gguf()
    said: list[tuple[str, float | None]] = []
    config = Config(model=str(path), cache_dir=str(tmp_path / "cache"))
    first = resolve(config, progress=lambda text, fraction=None: said.append((text, fraction)))
    assert first.source == "gguf"
    assert first.path.parent == tmp_path / "cache"
    fractions = [fraction for text, fraction in said if text == "converting tiny.gguf" and fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    said.clear()
    assert resolve(config, progress=lambda text, fraction=None: said.append((text, fraction))) == first
    assert said == []


def test_changed_gguf_file_is_converted_again(make_gguf: Callable[..., Path], tmp_path: Path, quiet: Quiet) -> None:
    config = Config(model=str(make_gguf()), cache_dir=str(tmp_path / "cache"))
    first = resolve(config, progress=quiet)
    make_gguf(types="Q8_0")
    second = resolve(config, progress=quiet)
    assert first.path != second.path
