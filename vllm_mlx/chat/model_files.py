"""The small files beside a model's weights that say how its text is made: configuration, special tokens, template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from vllm_mlx.core import sampling
from vllm_mlx.core.errors import InvalidRequest, ModelError

_GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_UNLIMITED = 10**15
"""Configurations write a huge number where they mean that there is no limit."""


class AddedToken(msgspec.Struct, frozen=True):
    """A token that tokenizer_config.json adds to the vocabulary."""

    id: int
    content: str
    special: bool


class TextFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a model folder says about text, apart from the vocabulary."""

    special_tokens: dict[str, str]
    """By role, such as 'bos_token': the token's text. Chat templates see all of them."""
    added_tokens: tuple[AddedToken, ...]
    add_bos: bool | None
    """None leaves it to the tokenizer's own rules; so does `add_eos`."""
    add_eos: bool | None
    eos_token_ids: frozenset[int]
    """From generation_config.json and config.json; `special_tokens['eos_token']` is one more."""
    generation_defaults: dict[str, Any]
    """Fields of `SamplingParams` that the model recommends."""
    max_length: int | None
    model_type: str
    """Of config.json; empty if it does not say."""
    chat_template: str | None


def read(folder: Path) -> TextFacts:
    """Read what is there; every file is optional.

    Raises:
        ModelError: a file is malformed; the message names it.
    """
    config = _object(folder / "config.json")
    generation = _object(folder / "generation_config.json")
    tokenizer = {**_object(folder / "special_tokens_map.json"), **_object(folder / "tokenizer_config.json")}
    add_bos, add_eos = tokenizer.get("add_bos_token"), tokenizer.get("add_eos_token")
    return TextFacts(
        special_tokens=_special_tokens(tokenizer),
        added_tokens=tuple(_added_tokens(folder, tokenizer)),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        add_eos=add_eos if isinstance(add_eos, bool) else None,
        eos_token_ids=frozenset(
            [*_eos_ids(folder / "generation_config.json", generation), *_eos_ids(folder / "config.json", config)]
        ),
        generation_defaults=_generation_defaults(folder / "generation_config.json", generation),
        max_length=_max_length(tokenizer, config),
        model_type=str(config.get("model_type") or ""),
        chat_template=_chat_template(folder, tokenizer.get("chat_template")),
    )


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file."""
    text = _text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must be a JSON object.")
    return value


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error


def _special_tokens(tokenizer: dict[str, Any]) -> dict[str, str]:
    """Everything named `..._token`: a string, or an object with its `content`."""
    extra = tokenizer.get("extra_special_tokens")
    named = {**(extra if isinstance(extra, dict) else {}), **tokenizer}
    contents = {name: _content(value) for name, value in named.items() if name.endswith("_token")}
    return {name: content for name, content in contents.items() if content is not None}


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _added_tokens(folder: Path, tokenizer: dict[str, Any]) -> Iterator[AddedToken]:
    listed = tokenizer.get("added_tokens_decoder") or {}
    try:
        for token_id in sorted(listed, key=int):
            yield AddedToken(int(token_id), listed[token_id]["content"], bool(listed[token_id].get("special", False)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is malformed.") from error


def _eos_ids(path: Path, values: dict[str, Any]) -> list[int]:
    """`eos_token_id` is a number or a list; multimodal models keep it in `text_config`."""
    inner = values.get("text_config")
    given = values.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
    found = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token_id, int) for token_id in found):
        raise ModelError(f"{path}: eos_token_id must be a number or a list of numbers, not {given!r}.")
    return found


def _generation_defaults(path: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """The recommended sampling; nothing if the model is meant to be sampled greedily by its own library."""
    if generation.get("do_sample") is False:
        return {}
    found = {name: generation[name] for name in _GENERATION_FIELDS if generation.get(name) is not None}
    try:
        sampling.merge({}, found)
    except InvalidRequest as error:
        raise ModelError(f"{path}: {error.message}") from error
    return found


def _max_length(tokenizer: dict[str, Any], config: dict[str, Any]) -> int | None:
    inner = config.get("text_config")
    config = {**(inner if isinstance(inner, dict) else {}), **config}
    limits = (tokenizer.get("model_max_length"), config.get("max_position_embeddings"))
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < _UNLIMITED]
    return min(known, default=None)


def _chat_template(folder: Path, in_config: Any) -> str | None:
    """The template file comes first, then chat_template.json, then the tokenizer's configuration."""
    template = _text(folder / "chat_template.jinja")
    if template is not None:
        return template
    separate = _object(folder / "chat_template.json").get("chat_template")
    path = folder / ("tokenizer_config.json" if separate is None else "chat_template.json")
    return _default_template(path, in_config if separate is None else separate)


def _default_template(path: Path, given: Any) -> str | None:
    """One template, or the one named 'default' of a list of named ones."""
    if given is None or isinstance(given, str):
        return given
    try:
        named = {entry["name"]: entry["template"] for entry in given}
    except (TypeError, KeyError) as error:
        raise ModelError(f"{path}: chat_template must be a text or a list of named templates.") from error
    chosen = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    if not isinstance(chosen, str):
        raise ModelError(f"{path}: none of the chat templates ({', '.join(map(str, named))}) is named 'default'.")
    return chosen
