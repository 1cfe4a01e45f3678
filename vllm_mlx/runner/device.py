"""What the machine can do: ask here, never assume Metal."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import mlx.core as mx
import msgspec

from vllm_mlx.core.step import MemoryUse

GIB = 1 << 30
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Device(msgspec.Struct, frozen=True):
    """The device that MLX computes on in this process."""

    backend: str
    """'metal', 'cuda' or 'cpu'."""
    name: str
    memory_bytes: int
    """What the device offers one process: Metal's recommended working set, a GPU's memory, or the machine's memory."""

    @property
    def is_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.backend != "cpu"


def probe() -> Device:
    """Find the default device."""
    info = mx.device_info()
    if mx.default_device().type == mx.DeviceType.gpu:
        backend = "metal" if mx.metal.is_available() else "cuda"
        sizes = (info.get(key) for key in ("max_recommended_working_set_size", "total_memory", "memory_size"))
        memory = next((int(size) for size in sizes if size), machine_memory_bytes())
    else:
        backend, memory = "cpu", machine_memory_bytes()
    return Device(backend, str(info.get("device_name") or info.get("architecture") or backend), memory)


def machine_memory_bytes() -> int:
    """Memory of the machine, or of the container if that has less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(limit for file in CONTAINER_LIMITS if (limit := _read_limit(file)))])


def _read_limit(file: Path) -> int | None:
    """A limit in bytes; None where there is none ('max', or no such file)."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def configure(device: Device, utilization: float) -> None:
    """Set MLX's limits for a server: keep freed buffers for reuse, wire weights on Metal, no g++ per kernel on a CPU.

    MLX's own cache limit on a CPU is 32 MiB, less than one prefill chunk frees and asks for again. On CUDA the limit is
    all that may be used, as MLX's own is: what goes beyond it is given back at once, and for memory that the host can
    read that waits until the device has nothing to do.
    """
    limit = int(device.memory_bytes * utilization)
    mx.set_cache_limit(limit if device.backend == "cuda" else min(2 * GIB, device.memory_bytes // 16))
    if device.is_gpu:
        mx.set_memory_limit(limit)
        if device.backend == "metal":
            mx.set_wired_limit(min(limit, device.memory_bytes))
    else:
        mx.disable_compile()


def memory_use(*, weights: int, pages: int) -> MemoryUse:
    """Bytes that MLX holds now."""
    return MemoryUse(
        active=mx.get_active_memory(),
        cache=mx.get_cache_memory(),
        peak=mx.get_peak_memory(),
        weights=weights,
        pages=pages,
    )


def give_back() -> None:
    """Give freed memory back to the system: what MLX keeps for later and, where it can be asked, the C library.

    glibc gives back by itself only what was freed at the end of its heap, and one small array that stays keeps all
    those before it. The next to ask for memory pays for it: call this at rest.
    """
    mx.clear_cache()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc's own
        library.malloc_trim(0)


def end_streams() -> None:
    """End the worker threads of this thread's streams; MLX is of no use on it afterwards.

    A process that exits while such a worker is still there is aborted by the C++ runtime.
    """
    mx.synchronize()
    mx.clear_streams()
