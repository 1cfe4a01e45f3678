"""From text to `Config`: flags and environment variables, both made from the fields."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vllm_mlx.core.config import Config, docs, flag
from vllm_mlx.core.errors import ConfigError

ENV_PREFIX = "VLLM_MLX_"
GROUPS = {
    "model": "The model",
    "server": "The server",
    "engine": "Memory and scheduling",
    "defaults": "Defaults of requests",
}
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


class Setting(typing.NamedTuple):
    """One field of `Config`, as the command line sees it."""

    name: str
    kind: type
    """str, int, float, bool, dict or tuple (of texts)."""
    default: Any
    group: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    metavar: str
    doc: str

    @property
    def flags(self) -> tuple[str, ...]:
        """Every spelling on the command line, the field's own first."""
        return (flag(self.name), *self.aliases)

    @property
    def variable(self) -> str:
        """The environment variable."""
        return ENV_PREFIX + self.name.upper()


def settings(groups: Iterable[str] = GROUPS) -> list[Setting]:
    """The fields of some groups, in order."""
    hints, texts, wanted = typing.get_type_hints(Config), docs(), set(groups)
    return [
        Setting(
            name=field.name,
            kind=_kind(hints[field.name]),
            default=field.default,
            group=field.metadata["group"],
            choices=field.metadata["choices"],
            aliases=field.metadata["flags"],
            metavar=field.metadata["metavar"],
            doc=texts[field.name],
        )
        for field in dataclasses.fields(Config)
        if field.metadata["group"] in wanted
    ]


def add_arguments(parser: argparse.ArgumentParser, fields: Iterable[Setting]) -> None:
    """Give the parser one flag a field; values stay text and absent ones are not set at all."""
    sections: dict[str, Any] = {}
    for setting in fields:
        if setting.group not in sections:
            sections[setting.group] = parser.add_argument_group(GROUPS[setting.group])
        text = setting.doc.replace("%", "%%")
        options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": text}
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(setting)
            if setting.kind is tuple:
                options["action"] = "append"
            elif setting.default is not None:
                options["help"] = f"{text} [{setting.default}]"
        sections[setting.group].add_argument(*setting.flags, **options)


def make_config(given: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """Settings from `given` (field name to a value, or to its text), else the environment, else the defaults.

    Names in `given` that are no field are left alone.

    Raises:
        ConfigError: a value has the wrong type or is out of range; the message names its flag or variable.
    """
    values: dict[str, Any] = {}
    for setting in settings():
        if setting.name in given:
            value = given[setting.name]
            is_text = isinstance(value, str)
            values[setting.name] = convert(setting, value, source=flag(setting.name)) if is_text else value
            if setting.kind is tuple:
                values[setting.name] = tuple(values[setting.name])
        elif text := environment.get(setting.variable, ""):
            values[setting.name] = convert(setting, text, source=setting.variable)
    if "max_tokens" not in values and "max_request_tokens" in values:
        # a limit below the default output length is a limit for that too
        values["max_tokens"] = min(Config().max_tokens, values["max_request_tokens"])
    return Config(**values)


def arguments_of(config: Config) -> list[str]:
    """Flags that say what differs from the defaults, but for the API key, which others can see on a command line."""
    found: list[str] = []
    for setting in settings():
        value = getattr(config, setting.name)
        if value == setting.default or setting.name == "api_key":
            continue
        if setting.kind is bool:
            found.append(setting.flags[0] if value else "--no-" + setting.flags[0][2:])
        elif setting.kind is tuple:
            found += [f"{setting.flags[0]}={part}" for part in value]
        else:
            text = json.dumps(value) if setting.kind is dict else str(value)
            found.append(f"{setting.flags[0]}={text}")
    return found


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """One line for every `VLLM_MLX_...` variable that no setting reads."""
    known = [setting.variable for setting in settings()]
    return [
        f"{name} is not a setting{did_you_mean(name, known)}"
        for name in sorted(environment)
        if name.startswith(ENV_PREFIX) and name not in known
    ]


def convert(setting: Setting, text: str, *, source: str) -> Any:
    """The value that `text` spells, in the setting's type. `source` is the flag or variable, for the message.

    Raises:
        ConfigError: it spells none.
    """
    value = _CONVERTERS[setting.kind](text)
    if value is None:
        raise ConfigError(f"{source}: {text!r} is not {_EXPECTED[setting.kind]}")
    if setting.choices and value not in setting.choices:
        expected = ", ".join(setting.choices)
        raise ConfigError(f"{source}: {text!r} is not one of {expected}{did_you_mean(text, setting.choices)}")
    return value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _kind(hint: Any) -> type:
    """The type of a field, without `| None` and type arguments."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    kind: type = typing.get_origin(hint) or hint
    return kind


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "{" + ",".join(setting.choices) + "}"
    return setting.metavar or {int: "N", float: "X", dict: "JSON"}.get(setting.kind, setting.name.upper())


def _to_int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _to_float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _to_bool(text: str) -> bool | None:
    word = text.strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def _to_texts(text: str) -> tuple[str, ...]:
    """An environment variable has room for several values: commas part them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _to_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


_CONVERTERS: Mapping[type, Callable[[str], Any]] = types.MappingProxyType(
    {str: str, int: _to_int, float: _to_float, bool: _to_bool, dict: _to_object, tuple: _to_texts}
)
_EXPECTED: Mapping[type, str] = types.MappingProxyType(
    {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        dict: "a JSON object",
        str: "text",
        tuple: "a list",
    }
)
