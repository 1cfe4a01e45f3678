"""`vllm-mlx doctor`: what this machine offers, which kernels are live on it, and how fast they are."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import msgspec

from vllm_mlx.cli.display import Display
from vllm_mlx.cli.doctor_host import Host, examine_host
from vllm_mlx.core import log
from vllm_mlx.core.config import Config
from vllm_mlx.core.step import ProgressCallback
from vllm_mlx.models.resolve import resolve
from vllm_mlx.runner import blas

if TYPE_CHECKING:
    from vllm_mlx.runner.doctor import DeviceReport, KernelReport, ModelReport

NO_GPU = "none: there is no GPU, and on a CPU attention reads pages that are gathered for it"
HAS_MASK = "none: the model hands its attention a mask, which no paged kernel reads; layers are kept in rows"
NO_PAGES = "none needed: no layer of this model is kept in pages"

NVIDIA_UNUSED = "there is an NVIDIA driver, but this build of MLX uses the CPU: install the cuda13 or cuda12 extra"


class Report(msgspec.Struct, frozen=True):
    """All that was found out."""

    host: Host
    device: DeviceReport | None = None
    """None if MLX does not work."""
    mlx_problem: str | None = None
    model: ModelReport | None = None
    """None if no model was named."""
    kernels: tuple[KernelReport, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if all is well, or there is no GPU; 1 if MLX or a kernel does not work."""
        return int(self.device is None or not all(kernel.live for kernel in self.kernels))

    @property
    def no_kernels(self) -> str | None:
        """Why there is none; None if there are some."""
        if self.kernels or self.device is None:
            return None
        if not self.device.is_gpu:
            return NO_GPU
        return HAS_MASK if self.model is not None and self.model.has_mask else NO_PAGES

    def warnings(self) -> list[str]:
        """What may go wrong, and what to do about it."""
        found = [self.mlx_problem] if self.mlx_problem else []
        if self.host.has_nvidia_driver and self.device is not None and not self.device.is_gpu:
            found.append(NVIDIA_UNUSED)
        return [*found, *self.host.warnings()]


def doctor(config: Config, *, has_model: bool, output_format: str) -> int:
    """Examine this machine and print what was found; returns the exit code. `has_model`: `config` names a model.

    Raises:
        ModelError: the model cannot be found, loaded or run.
    """
    log.setup("warning")
    with Display() as display:
        report = examine(config, has_model=has_model, progress=display)
    if output_format == "json":
        print(json.dumps(as_json(report), indent=2))
    else:
        from vllm_mlx.cli.doctor_text import print_report

        print_report(report, sys.stdout)
    return report.exit_code


def examine(config: Config, *, has_model: bool, progress: ProgressCallback) -> Report:
    """Look at the machine, then at MLX, then at the model, then at the kernels."""
    progress("looking at this machine")
    host = examine_host(config)
    path = resolve(config, progress=progress, needs_tokenizer=False).path if has_model else None
    progress("starting MLX")
    blas.preload_here()
    try:
        from vllm_mlx.runner import doctor as with_mlx

        progress("timing copies")
        device = with_mlx.examine_device()
    except (ImportError, RuntimeError) as error:
        return Report(host, mlx_problem=f"MLX does not work here: {' '.join(str(error).split())}")
    model = with_mlx.examine_model(path, config, progress=progress) if path is not None else None
    variants = with_mlx.common_variants() if model is None else model.variants
    kernels = with_mlx.examine_kernels(variants, device, progress=progress)
    if model is None:
        kernels += with_mlx.examine_heads(device)
    return Report(host, device, None, model, kernels)


def as_json(report: Report) -> dict[str, object]:
    """The report as plain objects."""
    fields: dict[str, object] = msgspec.to_builtins(report)
    return {**fields, "no_kernels": report.no_kernels, "warnings": report.warnings(), "exit_code": report.exit_code}
