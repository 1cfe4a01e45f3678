"""Prometheus metrics (https://prometheus.io/docs/practices/naming/). Each app has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric

from vllm_mlx.api.collectors import PREFIX, EngineCollector, ServerCollector
from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.core.messages import EngineClient

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
        self.registry.register(EngineCollector(engine, model))
        self.registry.register(ServerCollector(lifecycle))
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
