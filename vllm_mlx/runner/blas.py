"""A fast BLAS for MLX's CPU build, which links the reference one (tens of times slower in matrix products).

The dynamic linker takes a symbol from the first library that has it, so a library loaded before MLX serves its calls.
For a child process that is `LD_PRELOAD` (`preload_environment`); for this process, a global `dlopen` before MLX is
imported (`preload_here`), which works when the library's own dependencies are installed.
Only Linux needs it: on macOS MLX uses Accelerate.

`python -m vllm_mlx.runner.blas` prints the shell lines that set the environment.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shlex
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

SYSTEM_NAMES = ("openblas", "blis", "mkl_rt")


class Blas(NamedTuple):
    """A library that can be preloaded: what to call it, its path, and a folder that has its dependencies."""

    name: str
    path: str
    library_dir: str | None = None


def find_blas() -> Blas | None:
    """The best BLAS here: the system's OpenBLAS, BLIS or MKL, else the one of the `cpu` extra; None off Linux."""
    if sys.platform != "linux":
        return None
    for name in SYSTEM_NAMES:
        if found := ctypes.util.find_library(name):
            return Blas(f"{name} (system)", found)
    return _packaged_openblas()


def preload_environment() -> dict[str, str]:
    """Variables that make a child process load the fast BLAS first; empty if there is none or one is already set."""
    blas = find_blas()
    if blas is None or is_preloaded():
        return {}
    variables = {"LD_PRELOAD": _prepend(blas.path, os.environ.get("LD_PRELOAD"))}
    if blas.library_dir is not None:
        variables["LD_LIBRARY_PATH"] = _prepend(blas.library_dir, os.environ.get("LD_LIBRARY_PATH"))
    return variables


def preload_here() -> None:
    """Load the fast BLAS into this process. Does nothing once MLX is loaded, or where the library cannot be opened."""
    blas = find_blas()
    if blas is None or is_preloaded() or "mlx.core" in sys.modules:
        return
    try:
        ctypes.CDLL(blas.path, ctypes.RTLD_GLOBAL)
    except OSError:
        return


def is_preloaded() -> bool:
    """Whether this process already has a fast BLAS."""
    return _loaded_blas() is not None


def describe() -> str:
    """One line for the start-up notes about the BLAS that this process uses."""
    if sys.platform != "linux":
        return "BLAS: Accelerate"
    loaded = _loaded_blas()
    if loaded is not None:
        return f"BLAS: {loaded}"
    if find_blas() is not None:
        return 'BLAS: reference (slow); before starting: eval "$(python -m vllm_mlx.runner.blas)"'
    return "BLAS: reference (slow); install the `cpu` extra or the system's libopenblas0"


def _loaded_blas() -> str | None:
    """Name of a fast BLAS mapped into this process."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for library in ("libopenblas", "libblis", "libmkl_rt"):
        for line in mapped.splitlines():
            path = line.split(maxsplit=5)[-1]
            # numpy's wheel has an OpenBLAS with renamed symbols, which MLX cannot use
            if Path(path).name.startswith(library) and "numpy" not in path:
                return Path(path).name
    return None


def _packaged_openblas() -> Blas | None:
    """OpenBLAS of the `cmeel-openblas` wheel, with the Fortran runtime that MLX's CPU wheel brings."""
    site = Path(sysconfig.get_paths()["platlib"])
    library = site / "cmeel.prefix" / "lib" / "libopenblas.so.0"
    if not library.exists():
        return None
    if ctypes.util.find_library("gfortran"):
        return Blas("openblas (cmeel-openblas)", str(library))
    runtime = next((site / "mlx_cpu.libs").glob("libgfortran-*"), None)
    if runtime is None:
        return None
    # The wheel asks for libgfortran.so.5 by its plain name; MLX's wheel has it under a mangled one.
    folder = Path(tempfile.gettempdir()) / f"vllm-mlx-blas-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        return None
    _link(folder / "libgfortran.so.5", runtime)
    for quadmath in runtime.parent.glob("libquadmath-*"):
        _link(folder / quadmath.name, quadmath)
    return Blas("openblas (cmeel-openblas)", str(library), str(folder))


def _link(link: Path, target: Path) -> None:
    """Point `link` at `target`, in one step so that a process starting now never misses it."""
    if link.is_symlink() and link.readlink() == target:
        return
    temporary = link.with_name(f"{link.name}.{os.getpid()}")
    temporary.symlink_to(target)
    temporary.replace(link)


def _prepend(value: str, rest: str | None) -> str:
    return f"{value}:{rest}" if rest else value


if __name__ == "__main__":
    for variable, value in preload_environment().items():
        print(f"export {variable}={shlex.quote(value)}")
