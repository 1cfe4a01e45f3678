"""What `vllm-mlx doctor` can say without MLX: versions, limits, room on disk, and whether the port is free."""

from __future__ import annotations

import platform
import resource
import shutil
from importlib import metadata
from pathlib import Path

import msgspec

from vllm_mlx import __version__
from vllm_mlx.cli.listen import listen
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError

PACKAGES = ("mlx", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal", "mlx-lm")
FEW_OPEN_FILES = 2048
"""Every connection is an open file: fewer are used up by the requests that a server takes by default."""
LITTLE_DISK_BYTES = 10 << 30
"""A model of eight billion parameters takes half of that at four bits."""

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class Disk(msgspec.Struct, frozen=True):
    """Where models are kept."""

    use: str
    path: str
    free_bytes: int


class Host(msgspec.Struct, frozen=True):
    """This machine, as far as a server cares."""

    versions: dict[str, str]
    open_files: int | None
    """Most that a process may have open at a time; None is no limit."""
    address_space_bytes: int | None
    """Most memory that a process may map; None is no limit."""
    disks: tuple[Disk, ...]
    address: str
    """Where a server would listen."""
    port_problem: str | None
    has_nvidia_driver: bool

    def warnings(self) -> list[str]:
        """What may go wrong, and what to do about it."""
        found = []
        if self.open_files is not None and self.open_files < FEW_OPEN_FILES:
            found.append(f"only {self.open_files} files may be open, so few clients can connect: ulimit -n 65536")
        if self.address_space_bytes is not None:
            found.append("the address space is limited, which MLX may not be able to live with: ulimit -v unlimited")
        found += [
            f"little room for {disk.use} in {disk.path}: {disk.free_bytes / 2**30:.1f} GiB"
            for disk in self.disks
            if disk.free_bytes < LITTLE_DISK_BYTES
        ]
        return found + ([self.port_problem] if self.port_problem else [])


def examine_host(config: Config) -> Host:
    """Look around; `config` says where models are kept and where a server would listen."""
    return Host(
        versions=_versions(),
        open_files=_limit(resource.RLIMIT_NOFILE),
        address_space_bytes=_limit(resource.RLIMIT_AS),
        disks=tuple(_disks(config)),
        address=f"{config.host}:{config.port}",
        port_problem=_port_problem(config),
        has_nvidia_driver=NVIDIA_DRIVER.exists(),
    )


def _versions() -> dict[str, str]:
    installed = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "vllm-mlx": __version__,
        **installed,
        "Python": platform.python_version(),
        "OS": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _limit(kind: int) -> int | None:
    """The limit that holds now, not the one that it may be raised to."""
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _disks(config: Config) -> list[Disk]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = {"downloaded models": Path(HF_HUB_CACHE), "converted models": config.cache_path}
    return [Disk(use, str(path), shutil.disk_usage(_existing(path)).free) for use, path in folders.items()]


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _port_problem(config: Config) -> str | None:
    try:
        listen(config.host, config.port).close()
    except ConfigError as error:
        return error.message
    return None
