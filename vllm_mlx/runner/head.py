"""Logits of the last position only, unless others are asked for.

A prompt chunk of T tokens needs one row of logits, not T: for 2048 tokens and a vocabulary of 150,000 the others
would cost a gigabyte and, on small models, a fifth of the time. The modules below stand where the model has its output
projection and cut the hidden states [rows, T, dim] to [rows, 1, dim] first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

HEAD_NAMES = ("lm_head", "output", "output_layer")
EMBEDDING_NAMES = ("embed_tokens", "wte", "embeddings", "tok_embeddings", "embedding", "word_embeddings")


class WantedPositions:
    """Which position of each row is wanted: the last one, unless said otherwise."""

    def __init__(self) -> None:
        self._index: mx.array | None = None
        self._is_everywhere = False

    @contextmanager
    def at(self, index: mx.array) -> Iterator[None]:
        """For the time of a forward pass: position `index` [rows] of each row."""
        self._index = index
        try:
            yield
        finally:
            self._index = None

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """For the time of a forward pass: all positions."""
        self._is_everywhere = True
        try:
            yield
        finally:
            self._is_everywhere = False

    def of(self, array: mx.array) -> mx.array:
        """The wanted positions [rows, 1, ...] of [rows, tokens, ...]; of a single position, that one."""
        if self._is_everywhere:
            return array
        if self._index is None or array.shape[1] == 1:
            return array[:, -1:]
        return array[mx.arange(array.shape[0]), self._index][:, None]


class LastPositionHead(nn.Module):  # type: ignore[misc]
    """An output projection that sees the last position only."""

    def __init__(self, inner: nn.Module, wanted: WantedPositions) -> None:
        super().__init__()
        self.inner = inner
        self._wanted = wanted

    def __call__(self, hidden: mx.array) -> mx.array:
        result: mx.array = self.inner(self._wanted.of(hidden))
        return result


class LastPositionEmbedding(nn.Module):  # type: ignore[misc]
    """A tied embedding whose use as output projection sees the last position only."""

    def __init__(self, inner: nn.Module, wanted: WantedPositions) -> None:
        super().__init__()
        self.inner = inner
        self._wanted = wanted

    def __call__(self, token_ids: mx.array) -> mx.array:
        result: mx.array = self.inner(token_ids)
        return result

    def as_linear(self, hidden: mx.array) -> mx.array:
        """Logits [rows, 1, vocab] of hidden states [rows, tokens, dim]."""
        result: mx.array = self.inner.as_linear(self._wanted.of(hidden))
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def keep_last_position(model: nn.Module, vocab_size: int) -> WantedPositions:
    """Put the modules above where the model turns hidden states into `vocab_size` logits; returns what they obey.

    A model whose projection is not found keeps computing the logits of every position.
    """
    wanted = WantedPositions()
    replacements: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in HEAD_NAMES and isinstance(module, nn.Linear | nn.QuantizedLinear):
            if module.weight.shape[0] == vocab_size:
                replacements.append((name, LastPositionHead(module, wanted)))
        elif leaf in EMBEDDING_NAMES and isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            replacements.append((name, LastPositionEmbedding(module, wanted)))
    model.update_modules(tree_unflatten(replacements))
    return wanted
