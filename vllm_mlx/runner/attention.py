"""The one place where the library's attention is bound to our pages.

Every text architecture of mlx-lm imports `scaled_dot_product_attention` from `mlx_lm.models.base` and hands it the keys
and values that the layer's cache returned. `bind` puts `attend` in its place: a call whose keys came from one of our
views is answered by the view, which knows pages and lengths; every other call goes to the library.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models import base

ENTRY_POINT = "scaled_dot_product_attention"
_library_attention = getattr(base, ENTRY_POINT)


class Attending(Protocol):
    """A cache view that computes attention itself."""

    def owns(self, keys: Any, values: Any) -> bool:
        """Whether `keys` and `values` are what this view's `update_and_fetch` returned last."""
        ...

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attention of `queries` [rows, heads, tokens, dim] over the view's tokens; same shape back."""
        ...


def attend(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """What the models call. Arguments as in mlx-lm's function of this name's place."""
    if hasattr(cache, "attend") and cache.owns(keys, values):
        result: mx.array = cache.attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        return result
    library_result: mx.array = _library_attention(queries, keys, values, cache, scale, mask, sinks)
    return library_result


def bind() -> None:
    """Put `attend` in place of the library's function in every model module loaded so far. May be called again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and getattr(module, ENTRY_POINT, None) is _library_attention:
            setattr(module, ENTRY_POINT, attend)
