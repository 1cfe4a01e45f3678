"""What endpoints are given: made once by `create_app`, shared by reference, owned by nobody else."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.api.metrics import Metrics
from vllm_mlx.api.model_names import ModelNames
from vllm_mlx.api.response_store import ResponseStore
from vllm_mlx.chat.service import ChatService
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineClient


@dataclass(frozen=True, slots=True)
class Context:
    """The parts of a running server."""

    config: Config
    service: ChatService
    engine: EngineClient
    lifecycle: Lifecycle
    metrics: Metrics
    responses: ResponseStore
    names: ModelNames
    started_at: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds."""

    def check_model(self, name: str | None) -> None:
        """Raise NotFound unless `name` is a name or an alias of the served model; None is."""
        self.names.check(name)
