"""The application: parts in, an ASGI app out. Nothing here outlives the app."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from vllm_mlx import __version__
from vllm_mlx.api import endpoints, errors, openapi
from vllm_mlx.api.auth import Auth
from vllm_mlx.api.batches import Batches
from vllm_mlx.api.batches.background import BackgroundEngine
from vllm_mlx.api.context import Context
from vllm_mlx.api.cors import cors_options
from vllm_mlx.api.lifecycle import Lifecycle
from vllm_mlx.api.metrics import Metrics
from vllm_mlx.api.model_names import ModelNames
from vllm_mlx.api.observe import Observe
from vllm_mlx.api.response_store import ResponseStore
from vllm_mlx.chat.service import ChatService
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import EngineClient

_OWN = ("config", "service", "engine", "lifecycle", "metrics")
"""Parts of a context that the lines of batches have for themselves; the others are shared."""


def create_app(config: Config, service: ChatService, engine: EngineClient) -> FastAPI:
    """Join the parts. `app.state.lifecycle` drains the server; starting and stopping the engine is the caller's.

    `app.state.batches` is to be resumed by the caller, and closed at the end, as is `app.state.responses`.
    Raises ConfigError if the file of stored responses cannot be used.
    """
    context = _context(config, service, engine, responses=_response_store(config))
    app = _assembled(context)
    app.state.lifecycle = context.lifecycle
    app.state.responses = context.responses
    app.state.batches = Batches(_background(context), engine, config=config)
    return app


def _context(config: Config, service: ChatService, engine: EngineClient, *, responses: ResponseStore) -> Context:
    lifecycle = Lifecycle()
    metrics = Metrics(engine, model=config.model_name, lifecycle=lifecycle)
    return Context(config, service, engine, lifecycle, metrics, responses, ModelNames(config))


def _background(context: Context) -> FastAPI:
    """The same endpoints for the lines of batches: behind everybody else, without key and time limit, not counted."""
    config = dataclasses.replace(context.config, api_key=None, timeout=0)
    engine = BackgroundEngine(context.engine)
    service = context.service.over(engine, config=config)
    own = _context(config, service, engine, responses=context.responses)
    return _assembled(dataclasses.replace(context, **{name: getattr(own, name) for name in _OWN}))


def _assembled(context: Context) -> FastAPI:
    """Routes and middleware over the parts."""
    app = FastAPI(
        title="vllm-mlx",
        version=__version__,
        description="Inference on Apple's MLX, in OpenAI's dialect.",
        redirect_slashes=False,
    )
    for router in _routers(context):
        app.include_router(router)
    # The last one added is the outermost.
    app.add_middleware(Auth, api_key=context.config.api_key)
    app.add_middleware(errors.Guard)
    app.add_middleware(Observe, metrics=context.metrics, lifecycle=context.lifecycle)
    app.add_middleware(CORSMiddleware, **cors_options(context.config.origins))
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    app.add_exception_handler(RequestValidationError, errors.on_validation_error)
    openapi.install(app)
    return app


def _response_store(config: Config) -> ResponseStore:
    return ResponseStore(
        config.response_store,
        max_objects=config.response_store_max,
        max_mb=config.response_store_max_mb,
        ttl_s=config.response_store_ttl * 3600,
    )


def _routers(context: Context) -> Iterator[APIRouter]:
    """The router of every module in `endpoints/`."""
    for found in pkgutil.iter_modules(endpoints.__path__, endpoints.__name__ + "."):
        yield importlib.import_module(found.name).router(context)
