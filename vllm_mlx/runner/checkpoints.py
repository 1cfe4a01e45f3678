"""Checkpoints: copies of what a sequence has outside pages, from which other sequences go on.

A checkpoint shares no buffer with a running sequence. MLX changes an array in place only while nobody else holds its
buffer, so a shared one would make the next step copy a whole batch; and a slice would keep the buffer behind it alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import msgspec
from mlx.utils import tree_flatten, tree_map

from vllm_mlx.runner.rows import RowCache


class Checkpoint(msgspec.Struct, frozen=True, eq=False):
    """The state of every layer outside pages, in order; its arrays belong to nobody else."""

    layers: tuple[Any, ...]
    """Per layer lists, nested as the cache has them, of arrays and plain values; of a layer in rows, keys and values
    [1, heads, tokens, dim]."""

    def arrays(self) -> list[mx.array]:
        """All arrays, in order."""
        return [leaf for _, leaf in tree_flatten(list(self.layers)) if isinstance(leaf, mx.array)]

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in self.arrays())


class Checkpoints:
    """The checkpoints of a runner, by number."""

    def __init__(self) -> None:
        self._kept: dict[int, Checkpoint] = {}

    def __getitem__(self, number: int) -> Checkpoint:
        return self._kept[number]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(checkpoint.nbytes for checkpoint in self._kept.values())

    def keep(self, number: int, checkpoint: Checkpoint) -> None:
        """Remember it; a checkpoint that had the same number is forgotten."""
        self._kept[number] = checkpoint

    def drop(self, numbers: Iterable[int]) -> None:
        """Free them."""
        for number in numbers:
            del self._kept[number]


def take(caches: Sequence[Any], row: int, *, num_tokens: int) -> Checkpoint:
    """A checkpoint of `row` of caches, which has `num_tokens` tokens; caches of one sequence have one row."""
    index = mx.array([row])
    return Checkpoint(tuple(_state(cache, index, num_tokens) for cache in caches))


def take_whole(caches: Sequence[Any]) -> Checkpoint:
    """A checkpoint of the library's own caches of one sequence, composite ones taken apart (`layers.parts_of`)."""
    return Checkpoint(tuple(tree_map(_copied, cache.state) for cache in caches))


def restore(checkpoint: Checkpoint, caches: Sequence[Any], *, num_tokens: int) -> None:
    """Put a checkpoint into fresh caches of one sequence, `num_tokens` of its rows; it may be restored again.

    Raises:
        ValueError: it is not one of these caches.
    """
    if len(caches) != len(checkpoint.layers):
        raise ValueError(f"the checkpoint has {len(checkpoint.layers)} layers, the model {len(caches)} outside pages")
    for cache, state in zip(caches, checkpoint.layers, strict=True):
        if isinstance(cache, RowCache):
            cache.keys, cache.values = _rows(state, num_tokens)
            continue
        if not _has_form(state, cache.state):
            raise ValueError(f"the checkpoint does not fit the model's {type(cache).__name__}")
        # Assigning to an element changes the array's handle, so each sequence gets handles of its own.
        cache.state = tree_map(lambda leaf: mx.array(leaf) if isinstance(leaf, mx.array) else leaf, state)


def are_restorable(caches: Sequence[Any]) -> bool:
    """Whether the state of the library's caches can be set as well as read."""
    try:
        for cache in caches:
            cache.state = cache.state
    except (AttributeError, ValueError):
        return False
    return True


def _state(cache: Any, index: mx.array, num_tokens: int) -> Any:
    if isinstance(cache, RowCache):
        pair = (cache.keys, cache.values)
        return [None if array is None else array[:, :, :num_tokens][index] for array in pair]
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, mx.array) else leaf, cache.state)


def _copied(leaf: Any) -> Any:
    """A gather has a buffer of its own, and keeps every bit."""
    if not isinstance(leaf, mx.array):
        return leaf
    return leaf.reshape(1)[mx.array([0])].reshape(()) if leaf.ndim == 0 else leaf[mx.arange(leaf.shape[0])]


def _rows(state: Any, num_tokens: int) -> tuple[mx.array | None, mx.array | None]:
    """The first tokens of a layer's keys and values."""
    if isinstance(state, list) and len(state) == 2:
        if state[0] is None and state[1] is None:
            return None, None
        if all(isinstance(array, mx.array) and array.ndim == 4 for array in state):
            return state[0][:, :, :num_tokens], state[1][:, :, :num_tokens]
    raise ValueError("the checkpoint does not fit the model's rows")


def _has_form(state: Any, fresh: Any) -> bool:
    """Whether `state` is built like that of a fresh cache, which has numbers, and None for arrays that are to come."""
    if isinstance(fresh, list | tuple):
        is_list = isinstance(state, list | tuple) and len(state) == len(fresh)
        return is_list and all(_has_form(one, other) for one, other in zip(state, fresh, strict=True))
    return fresh is None or type(state) is type(fresh)
