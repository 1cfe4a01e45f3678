"""Uploaded files, and batches of requests that are carried out when nobody else needs the model."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.routing import Match

from vllm_mlx.api.batches.desk import Desk
from vllm_mlx.api.batches.runner import BatchRunner
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineClient

POSSIBLE = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""Endpoints that a batch may name, as far as this server has them."""


class Batches:
    """The store of files and batches, and who carries these out."""

    def __init__(self, app: FastAPI, engine: EngineClient, *, config: Config) -> None:
        """`app` answers the lines."""
        self.desk = Desk(config.files_path)
        self.runner = BatchRunner(app, engine, self.desk, config=config)
        self.endpoints = tuple(path for path in POSSIBLE if _takes(app, path))
        """Endpoints whose requests can be put into a batch."""

    async def close(self) -> None:
        """Stop, and close the store; a later server over the same folder goes on."""
        await self.runner.stop()
        await self.desk.close()


def batches_of(request: Request) -> Batches:
    """The batches of the server that received a request."""
    found = request.app.state.batches
    assert isinstance(found, Batches)
    return found


def _takes(app: FastAPI, path: str) -> bool:
    """Whether the app has an endpoint for POST at this path."""
    scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": []}
    return any(route.matches(scope)[0] is Match.FULL for route in app.routes)
