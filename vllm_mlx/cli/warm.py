"""`--warm-prompts`: conversations that are computed before the server is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.api.wire.cache import WarmBody, conversations, warm_request
from vllm_mlx.api.wire.decode import decode
from vllm_mlx.chat.collect import collect
from vllm_mlx.chat.service import ChatService
from vllm_mlx.core import log
from vllm_mlx.core.chat import Message
from vllm_mlx.core.errors import ConfigError, InvalidRequest, RequestError
from vllm_mlx.core.messages import EngineClient, EngineState
from vllm_mlx.core.step import ProgressCallback

WATCH_INTERVAL_S = 1.0
_log = log.get_logger("serve")
Conversations = Sequence[tuple[Message, ...]]


def read_warm_prompts(path: str) -> Conversations:
    """The conversations of a file: a JSON list of message lists.

    Raises:
        ConfigError: the file cannot be read, or an entry is wrong; the message names both.
    """
    try:
        raw = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"--warm-prompts: {path} cannot be read: {error.strerror}.") from error
    try:
        return conversations(decode(b'{"prompts":' + raw + b"}", WarmBody))
    except InvalidRequest as error:
        if error.param is None:
            raise ConfigError(f"--warm-prompts: {path} must be a JSON list of message lists.") from error
        raise ConfigError(f"--warm-prompts: {path}: {error.message}") from error


class Warmer:
    """Computes the conversations of `--warm-prompts`, one after the other."""

    def __init__(
        self, service: ChatService, prompts: Conversations, *, lifecycle: Lifecycle, progress: ProgressCallback
    ) -> None:
        self.lifecycle = lifecycle
        """The server is not ready while this works."""
        self._service = service
        self._prompts = prompts
        self._progress = progress

    async def run(self) -> None:
        """Compute all. One that the model cannot take ends the start; one that fails otherwise is only logged.

        Raises:
            ConfigError: the model's template refuses a conversation, or it is too long for the context.
        """
        num_tokens = 0
        for index, messages in enumerate(self._prompts):
            self._progress(f"warming prompts ({index + 1} of {len(self._prompts)})", index / len(self._prompts))
            num_tokens += await self._warm(messages, index)
        if self._prompts:
            _log.info("warmed %d prompts of %d tokens", len(self._prompts), num_tokens)

    async def keep(self, engine: EngineClient) -> None:
        """Compute all again whenever a new engine has taken the place of the one that had them. Runs until cancelled.

        Requests go on meanwhile, so the server stays ready.
        """
        num_warmed = engine.status().num_restarts
        while self._prompts:
            await asyncio.sleep(WATCH_INTERVAL_S)
            status = engine.status()
            if status.state is EngineState.READY and status.num_restarts != num_warmed:
                num_warmed = status.num_restarts
                await self.run()

    async def _warm(self, messages: tuple[Message, ...], index: int) -> int:
        request = warm_request(messages, request_id=f"warm-{index}", template_kwargs={})
        try:
            async with await self._service.warm(request) as events:
                return (await collect(events)).usage.prompt_tokens
        except InvalidRequest as error:
            raise ConfigError(f"--warm-prompts: entry {index}: {error.message}") from error
        except RequestError as error:
            _log.warning("prompt %d of --warm-prompts could not be warmed: %s", index, error.message)
            return 0
