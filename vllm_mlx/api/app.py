"""The application: parts in, an ASGI app out. Nothing here outlives the app."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from vllm_mlx import __version__
from vllm_mlx.api import endpoints, errors, openapi
from vllm_mlx.api.auth import Auth
from vllm_mlx.api.context import Context
from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.api.metrics import Metrics
from vllm_mlx.api.observe import Observe
from vllm_mlx.chat.service import ChatService
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineClient


def create_app(config: Config, service: ChatService, engine: EngineClient) -> FastAPI:
    """Join the parts. `app.state.lifecycle` drains the server; starting and stopping the engine is the caller's."""
    lifecycle = Lifecycle()
    metrics = Metrics(engine, model=config.model_name, lifecycle=lifecycle)
    context = Context(config, service, engine, lifecycle, metrics)
    app = FastAPI(
        title="vllm-mlx",
        version=__version__,
        description="Inference on Apple's MLX, in OpenAI's dialect.",
        redirect_slashes=False,
    )
    app.state.lifecycle = lifecycle
    for router in _routers(context):
        app.include_router(router)
    # The last one added is the outermost.
    app.add_middleware(Auth, api_key=config.api_key)
    app.add_middleware(errors.Guard)
    app.add_middleware(Observe, metrics=metrics, lifecycle=lifecycle)
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    app.add_exception_handler(RequestValidationError, errors.on_validation_error)
    openapi.install(app)
    return app


def _routers(context: Context) -> Iterator[APIRouter]:
    """The router of every module in `endpoints/`."""
    for found in pkgutil.iter_modules(endpoints.__path__, endpoints.__name__ + "."):
        yield importlib.import_module(found.name).router(context)
