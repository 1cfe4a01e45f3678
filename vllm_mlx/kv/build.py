"""The manager that a model and the settings call for."""

from __future__ import annotations

from collections.abc import Callable

from vllm_mlx.core.config import Config
from vllm_mlx.core.step import RunnerInfo
from vllm_mlx.kv.admission import checkpoint_rules
from vllm_mlx.kv.disk import DiskCache
from vllm_mlx.kv.manager import KVManager


def manager_of(info: RunnerInfo, config: Config, *, disk: DiskCache | None, clock: Callable[[], float]) -> KVManager:
    """A manager of the pages that a runner has, with nothing in them."""
    return KVManager(
        info.num_pages,
        page_size=info.cache.page_size,
        windows=info.cache.windows,
        max_chunk=config.prefill_step_size,
        shares_prefixes=config.prefix_cache,
        rules=checkpoint_rules(info),
        disk=disk,
        clock=clock,
    )
