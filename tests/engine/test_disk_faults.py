"""An engine on a disk that lies, fills up, fails or vanishes: every token as without one, and a warning at most."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from disk_tier import blob_files

from vllm_mlx.core.cachespec import Layout
from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ConfigError
from vllm_mlx.core.messages import DiskStats, FinishReason, Submit
from vllm_mlx.core.prompt import Prompt
from vllm_mlx.core.sampling import SamplingParams
from vllm_mlx.engine.thread import ThreadEngine
from vllm_mlx.kv.disk import open_disk
from vllm_mlx.kv.tiers.folder import BlobFolder
from vllm_mlx.kv.tiers.ssd import check_settings
from vllm_mlx.testing.fake import FakeRunner, fake_factory

TIMEOUT_S = 60.0
MODEL, OTHER_MODEL = b"fingerprint-of-x", b"fingerprint-of-y"
KINDS: dict[str, dict[str, Any]] = {
    "pages": {"num_pages": 48},
    "windows": {"num_pages": 96, "windows": (None, 6)},
    "rows": {"num_pages": 0, "checkpoint_bytes": 800},
    "pages and state": {"num_pages": 48, "state": Layout.STATE, "checkpoint_bytes": 800},
}
"""Of models, by what they keep; none has room for all prompts."""
PROMPTS = [tuple(random.Random(i).choices(range(100), k=50)) for i in range(6)]

pytestmark = pytest.mark.anyio


class Served:
    """A running engine, asked by one client."""

    def __init__(self, engine: ThreadEngine) -> None:
        self._engine = engine
        self._num_asked = 0

    async def tokens(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The greedy answer to a prompt."""
        self._num_asked += 1
        submit = Submit(f"r{self._num_asked}", Prompt(prompt), SamplingParams(temperature=0.0, seed=1, max_tokens=6))
        found: list[int] = []
        async for output in self._engine.generate(submit):
            assert output.finish is not FinishReason.ERROR, output.message
            found += output.token_ids
        return tuple(found)

    async def ask_twice(self) -> list[tuple[int, ...]]:
        """The answers to all prompts, in order; the second of each time, when it is worth a place on the disk."""
        answers = []
        for prompt in PROMPTS:
            first, second = await asyncio.gather(self.tokens(prompt), self.tokens(prompt))
            assert first == second
            answers.append(second)
        return answers

    async def disk(self, holds: Callable[[DiskStats], bool] = lambda _: True) -> DiskStats:
        """The figures of the disk, once nothing is queued any more and they are as expected."""
        while True:
            stats = self._engine.status().stats.disk
            if stats is not None and not stats.queued_bytes and holds(stats):
                return stats
            await asyncio.sleep(0.02)
            await self.tokens(PROMPTS[0])  # an engine that rests reports nothing


@asynccontextmanager
async def serving(
    kind: str, disk: Path | None, *, fingerprint: bytes = MODEL, **settings: Any
) -> AsyncIterator[Served]:
    stored: dict[str, Any] = {"ssd_cache_dir": str(disk), "ssd_cache_min_free_gb": 0} if disk else {}
    config = Config(max_num_seqs=2, **stored, **settings)
    options = {"page_size": 4, "vocab_size": 100, "max_model_len": 128, **KINDS[kind]}
    engine = ThreadEngine(fake_factory(fingerprint=fingerprint, **options), config)
    async with asyncio.timeout(TIMEOUT_S):
        try:
            await engine.start()
            yield Served(engine)
        finally:
            await engine.stop()


async def expected(kind: str) -> list[tuple[int, ...]]:
    """The answers of an engine that remembers nothing."""
    async with serving(kind, None, prefix_cache=False) as served:
        return [await served.tokens(prompt) for prompt in PROMPTS]


async def fill(kind: str, disk: Path) -> list[Path]:
    """Serve once with a sound disk; the files that this leaves."""
    async with serving(kind, disk) as served:
        assert await served.ask_twice() == await expected(kind)
    files = blob_files(disk)
    assert len(files) >= len(PROMPTS)
    return files


@pytest.fixture(autouse=True)
def no_errors(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Whatever happens to the disk, it is no error of the server's."""
    monkeypatch.setattr(logging.getLogger("vllm_mlx"), "propagate", True)
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.WARNING] == []


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    bit = random.Random(file.name).randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, random.Random(file.name).randrange(file.stat().st_size))


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def fill_with_zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def put_a_folder_there(file: Path) -> None:
    file.unlink()
    file.mkdir()


def take_away(file: Path) -> None:
    file.unlink()


DAMAGES = [flip_a_bit, cut, lengthen, fill_with_zeros, put_a_folder_there, take_away]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
async def test_damaged_files_change_no_token(kind: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    for file in await fill(kind, tmp_path):
        damage(file)
    async with serving(kind, tmp_path) as served:
        assert await served.ask_twice() == await expected(kind)
    async with serving(kind, tmp_path) as served:
        assert await served.ask_twice() == await expected(kind)
        repaired = await served.disk()
    # Where a folder is in the way, the file stays away for good; everything else was written anew.
    assert (repaired.num_hits > 0) == (damage is not put_a_folder_there)


@pytest.mark.parametrize("kind", KINDS)
async def test_files_that_have_changed_places_change_no_token(kind: str, tmp_path: Path) -> None:
    files = await fill(kind, tmp_path)
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, [*contents[1:], contents[0]], strict=True):
        file.write_bytes(content)
    async with serving(kind, tmp_path) as served:
        assert await served.ask_twice() == await expected(kind)
        assert (await served.disk(lambda stats: stats.num_corrupt > 0)).num_corrupt > 0


@pytest.mark.parametrize("kind", KINDS)
async def test_files_damaged_while_they_are_served_change_no_token(kind: str, tmp_path: Path) -> None:
    await fill(kind, tmp_path)
    answers = await expected(kind)
    async with serving(kind, tmp_path) as served:
        for number in range(30):
            for file in blob_files(tmp_path)[number % 4 :: 4]:
                with suppress(FileNotFoundError):  # the tier deletes what it finds damaged
                    (flip_a_bit, lengthen, take_away)[number % 3](file)
            index = number % len(PROMPTS)
            assert await served.tokens(PROMPTS[index]) == answers[index]


@pytest.mark.parametrize("kind", KINDS)
async def test_folder_that_vanishes_is_made_again(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    await fill(kind, folder)
    async with serving(kind, folder) as served:
        shutil.rmtree(folder.rename(tmp_path / "away"))
        assert await served.ask_twice() == await expected(kind)
        await served.disk(lambda stats: stats.num_saved > 0)
    assert blob_files(folder) != []


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
async def test_disk_that_takes_nothing_changes_no_token(
    kind: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlobFolder, "write", failing(number))
    async with serving(kind, tmp_path) as served:
        assert await served.ask_twice() == await expected(kind)
        stats = await served.disk(lambda stats: stats.problem is not None)
    assert os.strerror(number) in str(stats.problem)
    assert (stats.num_saved, blob_files(tmp_path)) == (0, [])


@pytest.mark.parametrize("kind", KINDS)
async def test_disk_that_fails_to_read_changes_no_token(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = await fill(kind, tmp_path)
    monkeypatch.setattr(BlobFolder, "read", failing(errno.EIO))
    async with serving(kind, tmp_path) as served:
        assert await served.ask_twice() == await expected(kind)
        stats = await served.disk(lambda stats: stats.num_misses > 0)
    assert stats.num_hits == 0
    assert {file for file in files if file.exists()} == set(files)


@pytest.mark.parametrize("kind", KINDS)
async def test_state_of_another_model_is_not_read(kind: str, tmp_path: Path) -> None:
    """Even where somebody has moved it to this one's place."""
    for file in await fill(kind, tmp_path):
        copy = tmp_path / OTHER_MODEL.hex() / file.relative_to(tmp_path / MODEL.hex())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    async with serving(kind, tmp_path, fingerprint=OTHER_MODEL) as served:
        for prompt, answer in zip(PROMPTS, await expected(kind), strict=True):
            assert await served.tokens(prompt) == answer
        stats = await served.disk(lambda stats: stats.num_misses > 0)
    assert (stats.num_hits, stats.num_corrupt) == (0, 0)


def test_engine_goes_on_without_a_disk_that_cannot_be_used_any_more(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder was")
    config = Config(ssd_cache_dir=str(blocked))
    with pytest.raises(ConfigError, match=r"--ssd-cache-dir: .*blocked is not a folder that can be used"):
        check_settings(config)
    assert open_disk(config, FakeRunner(fingerprint=b"fingerprint-of-x").info) is None
