"""Flags and environment variables become `Config`."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mlx.cli.parser import COMMANDS, parse
from vllm_mlx.cli.settings import Setting, convert, make_config, settings, unknown_variables
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError

SERVE = COMMANDS[0]
SAMPLES = {
    str: ("abc", "abc"),
    int: ("7", 7),
    float: ("0.5", 0.5),
    dict: ('{"a": [1]}', {"a": [1]}),
    tuple: ("app://mine", ("app://mine",)),  # an origin, and a name
}
OTHERS = {str: "x", int: "9", float: "0.25", dict: "{}", tuple: "app://yours"}
EVERY = pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.name)


def sample(setting: Setting) -> tuple[str, object]:
    return (setting.choices[-1], setting.choices[-1]) if setting.choices else SAMPLES[setting.kind]


def test_lower_request_limit_lowers_the_default_length() -> None:
    assert config_of("--max-request-tokens", "100").max_tokens == 100
    assert config_of("--max-request-tokens", "100000").max_tokens == Config().max_tokens
    with pytest.raises(ConfigError, match=r"^--max-tokens must not exceed --max-request-tokens"):
        config_of("--max-request-tokens", "100", "--max-tokens", "200")


def config_of(*arguments: str, **environment: str) -> Config:
    return make_config(vars(parse(SERVE, arguments)), environment)


def set_alone(setting: Setting, *arguments: str, **environment: str) -> object:
    """What a setting becomes, given with those without which it has no meaning."""
    needed = {"VLLM_MLX_SSD_CACHE_DIR": "folder"} if setting.name == "ssd_cache_key_file" else {}
    return getattr(config_of(*arguments, **needed, **environment), setting.name)


def test_every_field_is_a_setting() -> None:
    assert [setting.name for setting in settings()] == [field.name for field in dataclasses.fields(Config)]


def test_nothing_given_is_the_defaults() -> None:
    assert config_of() == Config()


@EVERY
def test_every_setting_has_a_flag(setting: Setting) -> None:
    for name in setting.flags:
        if setting.kind is bool:
            assert getattr(config_of(name), setting.name) is True
            assert getattr(config_of("--no-" + name[2:]), setting.name) is False
        else:
            text, value = sample(setting)
            assert set_alone(setting, name, text) == value
            assert set_alone(setting, f"{name}={text}") == value


@EVERY
def test_every_setting_has_a_variable_and_the_flag_wins(setting: Setting) -> None:
    if setting.kind is bool:
        assert getattr(config_of(**{setting.variable: "yes"}), setting.name) is True
        assert getattr(config_of("--no-" + setting.flags[0][2:], **{setting.variable: "1"}), setting.name) is False
        return
    text, value = sample(setting)
    other = setting.choices[0] if setting.choices else OTHERS[setting.kind]
    assert set_alone(setting, **{setting.variable: text}) == value
    assert set_alone(setting, setting.flags[0], text, **{setting.variable: other}) == value


def test_empty_variable_counts_as_absent() -> None:
    assert config_of(VLLM_MLX_PORT="").port == Config().port


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--port", "abc"], {}, "--port: 'abc' is not a whole number"),
        (["--port", "8000.5"], {}, "--port: '8000.5' is not a whole number"),
        ([], {"VLLM_MLX_PORT": "abc"}, "VLLM_MLX_PORT: 'abc' is not a whole number"),
        (["--timeout", "soon"], {}, "--timeout: 'soon' is not a number"),
        (["--timeout", "nan"], {}, "--timeout: 'nan' is not a number"),
        ([], {"VLLM_MLX_OFFLINE": "maybe"}, "VLLM_MLX_OFFLINE: 'maybe' is not true or false"),
        (["--default-chat-template-kwargs", "[1]"], {}, "--default-chat-template-kwargs: '[1]' is not a JSON object"),
        (["--default-chat-template-kwargs", "{"], {}, "--default-chat-template-kwargs: '{' is not a JSON object"),
        (
            ["--dtype", "float61"],
            {},
            "--dtype: 'float61' is not one of auto, float32, bfloat16, float16; did you mean float16?",
        ),
        (["--port", "70000"], {}, "--port must be between 0 and 65535."),
        (["--port"], {}, "--port: expected one argument"),
        (["--chunked-prefill-tokens"], {}, "--prefill-step-size: expected one argument"),
        (["--prot", "1"], {}, "unknown flag --prot; did you mean --port?"),
        (["--prot=1"], {}, "unknown flag --prot; did you mean --port?"),
        (["--max-num"], {}, "unknown flag --max-num; did you mean --max-num-seqs?"),
        (["--zzz"], {}, "unknown flag --zzz"),
        (["one", "two"], {}, "unexpected argument 'two'"),
        (["one", "--model", "two"], {}, "the model is given twice: one and --model two"),
    ],
)
def test_wrong_setting_is_named(arguments: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(*arguments, **environment)
    assert caught.value.message == message


def test_model_is_positional_or_a_flag() -> None:
    assert config_of("some/model").model == "some/model"
    assert config_of("--model", "some/model").model == "some/model"
    assert config_of("--port", "1", "some/model", VLLM_MLX_MODEL="other").model == "some/model"


def test_negative_value_is_a_value() -> None:
    assert config_of("--default-presence-penalty", "-1.5").default_presence_penalty == -1.5


def test_unknown_variable_is_reported() -> None:
    environment = {"VLLM_MLX_PROT": "1", "VLLM_MLX_PORT": "1", "PATH": "x"}
    assert unknown_variables(environment) == ["VLLM_MLX_PROT is not a setting; did you mean VLLM_MLX_PORT?"]


@given(st.dictionaries(st.text(), st.integers() | st.booleans() | st.none() | st.text()))
def test_json_setting_keeps_any_object(value: dict[str, object]) -> None:
    setting = next(s for s in settings() if s.kind is dict)
    assert convert(setting, json.dumps(value), source="--x") == value


@given(st.text())
def test_any_text_is_a_value_or_a_config_error(text: str) -> None:
    for setting in settings():
        with contextlib.suppress(ConfigError):
            assert isinstance(convert(setting, text, source="--x"), setting.kind)
