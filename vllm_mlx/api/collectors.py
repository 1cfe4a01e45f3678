"""What is read at the moment of a scrape: the engine's own figures, and the server's."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_mlx import __version__
from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.core.messages import DiskStats, EngineClient, EngineState, EngineStatus

PREFIX = "vllm_mlx_"


class EngineCollector(Collector):
    """One look at the engine for each scrape."""

    def __init__(self, engine: EngineClient, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        status = self._engine.status()
        stats = status.stats
        yield _gauge("requests_running", "Sequences being computed.", stats.num_running)
        yield _gauge("requests_waiting", "Sequences waiting for their turn.", stats.num_waiting)
        yield _gauge("requests_loading", "Of them, those whose prefix is read from the disk.", stats.num_loading)
        yield _gauge("pages_used", "KV cache pages in use.", stats.pages_used)
        yield _gauge("pages_free", "KV cache pages free, those of remembered prefixes included.", stats.pages_free)
        yield _gauge("pages_kept", "KV cache pages of remembered prefixes that nobody uses.", stats.pages_kept)
        yield _gauge("pages_pinned", "KV cache pages of pinned prefixes.", stats.pages_pinned)
        yield _gauge("checkpoints", "Remembered states of layers that cannot be cut.", stats.num_checkpoints)
        yield _counter("pages_evicted", "Pages of remembered prefixes given to others.", stats.num_evicted_pages)
        yield _counter("preemptions", "Sequences that gave their pages to others.", stats.num_preemptions)
        yield _counter("engine_steps", "Steps computed.", stats.num_steps)
        yield _counter("engine_tokens", "Tokens computed, prompt and output.", stats.num_tokens)
        yield _counter("engine_restarts", "Times the engine was restarted.", status.num_restarts)
        yield _gauge("model_loaded", "Whether the engine takes requests.", status.state is EngineState.READY)
        yield _labelled("engine_type", "Kind of engine.", {"engine_type": "batched"})
        yield from _disk(stats.disk)
        yield _memory(status)
        yield _kernels(status)
        yield _labelled("build_info", "Version and model.", self._build(status))

    def _build(self, status: EngineStatus) -> dict[str, str]:
        info = status.info
        return {
            "version": __version__,
            "model": self._model,
            "backend": info.backend if info else "",
            "dtype": info.dtype if info else "",
        }


class ServerCollector(Collector):
    """The HTTP side at the moment of the scrape."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield _gauge("http_requests_in_flight", "HTTP requests being answered.", self._lifecycle.num_open)
        yield _gauge("draining", "Whether the server is about to stop.", self._lifecycle.is_draining)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value)


def _labelled(name: str, text: str, labels: dict[str, str]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


def _kernels(status: EngineStatus) -> Metric:
    family = GaugeMetricFamily(PREFIX + "kernel_live", "Whether a GPU kernel passed its check.", labels=["kernel"])
    kernels = status.info.kernels if status.info else ()
    failed = {kernel.name for kernel in kernels if kernel.problem is not None}
    for name in dict.fromkeys(kernel.name for kernel in kernels):  # a series may be there only once
        family.add_metric([name], float(name not in failed))
    return family


def _disk(disk: DiskStats | None) -> Iterator[Metric]:
    """Figures of the cache on disk; no series without one."""
    if disk is None:
        return
    yield _gauge("disk_cache_blobs", "Pages and checkpoints on disk.", disk.num_blobs)
    yield _gauge("disk_cache_bytes", "Bytes of the files on disk.", disk.size_bytes)
    yield _gauge("disk_cache_queued_bytes", "Memory of what waits to be written.", disk.queued_bytes)
    yield _gauge("disk_cache_ahead_bytes", "Memory of what was read and not taken yet.", disk.ahead_bytes)
    yield _gauge("disk_cache_failing", "Whether the last write failed.", disk.problem is not None)
    yield _counter("disk_cache_saved", "Pages and checkpoints written.", disk.num_saved)
    yield _counter("disk_cache_written_bytes", "Bytes written.", disk.bytes_written)
    yield _counter("disk_cache_hits", "Pages and checkpoints loaded.", disk.num_hits)
    yield _counter("disk_cache_read_bytes", "Bytes of those.", disk.bytes_read)
    yield _counter("disk_cache_misses", "Asked for, and not loaded.", disk.num_misses)
    yield _counter("disk_cache_corrupt", "Files that were not what had been written.", disk.num_corrupt)
    yield _counter("disk_cache_evicted", "Files deleted to make room.", disk.num_evicted)
    refused = CounterMetricFamily(f"{PREFIX}disk_cache_refused", "Offered, and not written.", labels=["reason"])
    for reason, count in disk.num_refused.items():
        refused.add_metric([reason], count)
    yield refused


def _memory(status: EngineStatus) -> Metric:
    memory = status.stats.memory
    family = GaugeMetricFamily(PREFIX + "engine_memory_bytes", "Memory on the device.", labels=["kind"])
    for kind in ("active", "cache", "peak", "weights", "pages", "rows", "checkpoints", "staging"):
        family.add_metric([kind], getattr(memory, kind))
    return family
