"""Prometheus metrics (https://prometheus.io/docs/practices/naming/). Each app has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_mlx import __version__
from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.core.messages import EngineClient, EngineState, EngineStatus

PREFIX = "vllm_mlx_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class _Registry(CollectorRegistry):
    """Without the time of birth that the library adds to each counter and histogram as a gauge of its own."""

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """What the API side counts; the engine's own numbers are read when somebody looks."""

    def __init__(self, engine: EngineClient, *, model: str, lifecycle: Lifecycle) -> None:
        self.registry: CollectorRegistry = _Registry()
        self.registry.register(_EngineCollector(engine, model))
        self.registry.register(_ServerCollector(lifecycle))
        self.requests = self._counter("requests", "HTTP requests answered.", "endpoint", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens of finished requests.")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Prompt tokens that did not have to be computed.")
        self.prompts = self._counter("prompts", "Prompts of finished requests.")
        self.prompts_with_hit = self._counter("prompts_with_hit", "Of them, those whose beginning was remembered.")
        self.duration = self._histogram("request_duration", "From request to the end of its answer.", "endpoint")
        self.queue_time = self._histogram("request_queue_time", "From submission to the first computed chunk.")
        self.first_token = self._histogram("time_to_first_token", "From request to its first token.")
        self.inter_token = self._histogram(
            "inter_token_latency", "Between two pieces of one choice.", buckets=_TOKEN_SECONDS
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"{PREFIX}{name}_seconds", text, labels, buckets=buckets, registry=self.registry)

    def total(self, name: str) -> int:
        """Value of a counter without labels, such as 'prompt_tokens'."""
        return int(self.registry.get_sample_value(f"{PREFIX}{name}_total") or 0)


class _EngineCollector(Collector):
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
        yield _gauge("pages_used", "KV cache pages in use.", stats.pages_used)
        yield _gauge("pages_free", "KV cache pages free, those of remembered prefixes included.", stats.pages_free)
        yield _gauge("pages_kept", "KV cache pages of remembered prefixes that nobody uses.", stats.pages_kept)
        yield _gauge("pages_pinned", "KV cache pages of pinned prefixes.", stats.pages_pinned)
        yield _gauge("checkpoints", "Remembered states of layers that cannot be cut.", stats.num_checkpoints)
        yield _gauge("pages_evicted", "Pages of remembered prefixes given to others.", stats.num_evicted_pages)
        yield _counter("preemptions", "Sequences that gave their pages to others.", stats.num_preemptions)
        yield _counter("engine_steps", "Steps computed.", stats.num_steps)
        yield _counter("engine_tokens", "Tokens computed, prompt and output.", stats.num_tokens)
        yield _counter("engine_restarts", "Times the engine was restarted.", status.num_restarts)
        yield _gauge("model_loaded", "Whether the engine takes requests.", status.state is EngineState.READY)
        yield _labelled("engine_type", "Kind of engine.", {"engine_type": "batched"})
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


class _ServerCollector(Collector):
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


def _memory(status: EngineStatus) -> Metric:
    memory = status.stats.memory
    family = GaugeMetricFamily(PREFIX + "engine_memory_bytes", "Memory on the device.", labels=["kind"])
    for kind in ("active", "cache", "peak", "weights", "pages", "rows", "checkpoints", "staging"):
        family.add_metric([kind], getattr(memory, kind))
    return family
