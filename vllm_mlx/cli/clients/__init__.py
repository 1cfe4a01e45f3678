"""Coding agents that `launch` and `connect` know: one file a client, each with a `CLIENT`."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from vllm_mlx.cli.client import Client
from vllm_mlx.cli.settings import did_you_mean
from vllm_mlx.core.errors import ConfigError


@functools.cache
def clients() -> dict[str, Client]:
    """Every client by its name."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{name}").CLIENT for name in names]
    return {client.name: client for client in found}


def find_client(word: str) -> Client:
    """The client of that name. Raises ConfigError."""
    known = clients()
    if word not in known:
        raise ConfigError(f"unknown client {word!r} ({', '.join(known)}){did_you_mean(word, known)}")
    return known[word]
