"""A doctor's report for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vllm_mlx.cli.doctor import Report
    from vllm_mlx.runner.doctor import KernelReport

PIPE_WIDTH = 120
"""Columns of a table that does not go to a terminal."""
_GIB = 2**30


def print_report(report: Report, stream: TextIO) -> None:
    """Facts, a line per kernel, warnings."""
    console = Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False, markup=False)
    for name, value in _facts(report):
        console.print(f"{name:<10}{value}", soft_wrap=True)
    if report.kernels:
        console.print(_table(report.kernels))
        for kernel in report.kernels:
            if reason := kernel.problem or kernel.note:
                state = "not measured" if kernel.live else "not used"
                console.print(f"{kernel.name}: {state}: {reason}", soft_wrap=True)
    elif report.no_kernels:
        console.print(f"{'Kernels':<10}{report.no_kernels}", soft_wrap=True)
    for warning in report.warnings():
        console.print(f"{'Warning':<10}{warning}", soft_wrap=True)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    host, device = report.host, report.device
    yield "Versions", ", ".join(f"{name} {version}" for name, version in host.versions.items() if name != "OS")
    yield "OS", host.versions["OS"]
    if device is not None:
        yield "Device", f"{device.backend} ({device.name}), {device.memory_bytes / _GIB:.1f} GiB"
        yield "Copies", f"{_rate(device.copy_bytes_per_s)}, read and written"
        yield "Memory", f"{device.machine_memory_bytes / _GIB:.1f} GiB in this machine or container"
        if device.blas is not None:
            yield "BLAS", device.blas
    yield "Limits", f"{_limit(host.open_files)} open files"
    for disk in host.disks:
        yield "Disk", f"{disk.free_bytes / _GIB:.1f} GiB free for {disk.use} in {_short(disk.path)}"
    yield "Port", f"{host.address} is {'not free' if host.port_problem else 'free'}"
    if report.model is not None:
        yield "Model", "; ".join(f"{count} layers {layout}" for layout, count in report.model.layers.items())


def _table(kernels: tuple[KernelReport, ...]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("kernel")
    table.add_column("live")
    for name in ("error", "bandwidth", "of copies"):
        table.add_column(name, justify="right")
    for kernel in kernels:
        table.add_row(
            kernel.name,
            "yes" if kernel.live else "no",
            f"{kernel.error:.1e}" if kernel.live or kernel.error else "-",
            "-" if kernel.bytes_per_s is None else _rate(kernel.bytes_per_s),
            "-" if kernel.share_of_copy is None else f"{kernel.share_of_copy:.0%}",
        )
    return table


def _short(path: str) -> str:
    """With ~ for the home folder."""
    home = Path.home()
    return str(Path("~") / Path(path).relative_to(home)) if Path(path).is_relative_to(home) else path


def _rate(bytes_per_s: float) -> str:
    if bytes_per_s < 1e12:
        return f"{bytes_per_s / 1e9:.1f} GB/s"
    return f"{bytes_per_s / 1e12:.2f} TB/s"


def _limit(value: int | None) -> str:
    return "no limit on" if value is None else f"{value:,}"
