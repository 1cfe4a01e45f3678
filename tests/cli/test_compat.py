"""Flags of earlier releases."""

from __future__ import annotations

import pytest

from vllm_mlx.cli.compat import NO_LONGER_NEEDED, NOT_SUPPORTED_YET, OldFlag
from vllm_mlx.cli.parser import COMMANDS, parse
from vllm_mlx.cli.settings import make_config, settings
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError

SERVE = COMMANDS[0]


def words(flag: OldFlag) -> list[str]:
    return [flag.name, "8"] if flag.takes_value else [flag.name]


@pytest.mark.parametrize("flag", NO_LONGER_NEEDED, ids=lambda flag: flag.name)
def test_meaningless_flag_gives_one_notice_and_changes_nothing(flag: OldFlag) -> None:
    namespace = parse(SERVE, [*words(flag), "--port", "1234"])
    assert namespace.notices == [f"{flag.name} has no effect: {flag.notice}"]
    assert make_config(vars(namespace), {}) == Config(port=1234)


@pytest.mark.parametrize("flag", NOT_SUPPORTED_YET, ids=lambda flag: flag.name)
def test_flag_of_a_missing_feature_ends_the_command(flag: OldFlag) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(SERVE, words(flag))
    assert caught.value.message == f"{flag.name}: not supported yet ({flag.notice})"


def test_notices_add_up() -> None:
    namespace = parse(SERVE, ["--continuous-batching", "--use-paged-cache", "--prefill-batch-size=4"])
    assert [notice.split()[0] for notice in namespace.notices] == [
        "--continuous-batching",
        "--use-paged-cache",
        "--prefill-batch-size",
    ]


def test_old_flags_and_settings_are_distinct() -> None:
    old = [flag.name for flag in (*NO_LONGER_NEEDED, *NOT_SUPPORTED_YET)]
    assert len(set(old)) == len(old)
    assert not set(old) & {name for setting in settings() for name in setting.flags}


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (["--kv-cache-quantization"], "int8"),
        (["--kv-cache-quantization-bits", "4"], "int4"),
        (["--kv-cache-quantization-bits", "4", "--kv-cache-quantization"], "int4"),
        (["--kv-cache-quantization", "--kv-cache-quantization-bits=8"], "int8"),
        (["--kv-cache-quantization", "--kv-cache-dtype", "int8"], "int8"),
    ],
)
def test_old_flags_quantise_pages(given: list[str], dtype: str) -> None:
    assert make_config(vars(parse(SERVE, given)), {}) == Config(kv_cache_dtype=dtype)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--kv-cache-quantization-bits", "5"], "'5' is not 4 or 8"),
        (["--kv-cache-quantization", "--kv-cache-dtype", "auto"], "leave one out"),
        (["--kv-cache-dtype", "int4", "--kv-cache-quantization-bits", "8"], "means --kv-cache-dtype int8, but"),
    ],
)
def test_old_flags_that_contradict_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(SERVE, given)
