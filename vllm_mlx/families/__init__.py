"""Facts about model families, one record per file; `find` looks one up. A new file is found by itself."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from vllm_mlx.core.family import DEFAULT, Family


@functools.cache
def all_families() -> dict[str, Family]:
    """Every record, by model_type."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    families: list[Family] = [module.FAMILY for module in modules]
    return {model_type: family for family in families for model_type in family.model_types}


def find(model_type: str) -> Family:
    """The family of a config.json's `model_type`; the default where nothing special is known."""
    return all_families().get(model_type, DEFAULT)
