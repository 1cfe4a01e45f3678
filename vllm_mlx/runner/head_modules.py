"""What the library's modules do with the heads of queries and keys, in numbers that a kernel can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from vllm_mlx.runner.kernels.heads import HeadsVariant, PlainHeads


class Rotation(msgspec.Struct, frozen=True, eq=False):
    """How a rope turns heads."""

    dims: int
    """Elements of a head that turn, from the first on."""
    is_traditional: bool
    rates: mx.array
    """Radians per position, float32 [dims / 2]."""
    factor: float = 1.0
    """Of the elements that turn, before they do."""


def rotation_of(module: nn.Module) -> Rotation | None:
    """What one of the library's ropes does; None if the module is another, or may do more."""
    if type(module) is nn.RoPE:
        rates = module.scale * float(module.base) ** (-np.arange(0, module.dims, 2, dtype=np.float64) / module.dims)
    elif type(module) in (Llama3RoPE, YarnRoPE):
        rates = 1 / np.array(module._freqs, np.float64)
    else:
        return None
    if module.dims % 2:
        return None
    factor = module.mscale if type(module) is YarnRoPE else 1.0
    return Rotation(module.dims, module.traditional, mx.array(rates.astype(np.float32)), factor)


def norm_weight(module: nn.Module) -> mx.array | None:
    """The weight [dim] by which a root mean square norm multiplies (Gemma's is one more than what it keeps); None if
    the module is no such norm.
    """
    weight, eps = module.get("weight"), getattr(module, "eps", None)
    if not isinstance(weight, mx.array) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    x = mx.random.normal((3, weight.size), key=mx.random.key(0)).astype(weight.dtype)
    found = module(x)
    candidates = (weight, 1.0 + weight)
    return next((w for w in candidates if mx.array_equal(found, mx.fast.rms_norm(x, w, eps)).item()), None)


class HeadModules:
    """A rope, and norms of queries and keys or none: what is between a layer's product and its cache.

    Raises:
        ValueError: one of them is not known.
    """

    def __init__(self, rope: nn.Module, norms: Sequence[nn.Module] = ()) -> None:
        rotation, weights = rotation_of(rope), [norm_weight(norm) for norm in norms]
        known = tuple(weight for weight in weights if weight is not None)
        if rotation is None or len(known) < len(norms) or len({norm.eps for norm in norms}) > 1:
            raise ValueError("no kernel does what these modules do")
        self._rope, self._norms, self._rotation = rope, norms, rotation
        self.norms = known
        """Weights of the norms."""

    @property
    def rates(self) -> mx.array:
        """Radians per position, float32 [pairs]."""
        return self._rotation.rates

    def variant(self, *, heads: int, kv_heads: int, dim: int, dtype: mx.Dtype) -> HeadsVariant:
        """The kernel that does the same with heads of this form. Raises ValueError if none does."""
        rotation = self._rotation
        if rotation.dims > dim or any(weight.size != dim for weight in self.norms):
            raise ValueError(f"the modules are not for heads of {dim} elements")
        as_multiplied: Any = mx.array(rotation.factor, dtype).item()  # a number takes the type of the array
        return HeadsVariant(
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            dtype=str(dtype).removeprefix("mlx.core."),
            rotary_dims=rotation.dims,
            is_traditional=rotation.is_traditional,
            factor=as_multiplied,
            norm_eps=self._norms[0].eps if self._norms else None,
        )

    def plain(self, variant: HeadsVariant) -> PlainHeads:
        """What the modules themselves make of a product of that form."""

        def made(joined: mx.array, positions: mx.array | int) -> tuple[mx.array, ...]:
            every = joined.reshape(joined.shape[0], 1, -1, variant.dim)
            queries, keys, values = mx.split(every, [variant.heads, variant.heads + variant.kv_heads], axis=2)
            if self._norms:
                queries, keys = self._norms[0](queries), self._norms[1](keys)
            queries, keys, values = (part.transpose(0, 2, 1, 3) for part in (queries, keys, values))
            return self._rope(queries, offset=positions), self._rope(keys, offset=positions), values

        return made
