"""What the engine process imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_pytorch_is_not_imported_where_it_is_installed(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("print('imported')\n__version__ = '9.9.9'\n", encoding="utf-8")
    (tmp_path / "torch-9.9.9.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n"
    (tmp_path / "torch-9.9.9.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    code = "from vllm_mlx.cli import engine; engine.leave_out_torch(); import mlx_lm; print('done')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["done"]
