"""/v1/files and /v1/batches, driven by OpenAI's own client over the whole server but for the model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import openai
import pytest
from fixtures_server import Parts, client_of, running
from openai import AsyncOpenAI
from openai.types import Batch

from vllm_mlx.api.batches.store import Store
from vllm_mlx.core.config import Config
from vllm_mlx.core.messages import Submit

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}
TIMEOUT_S = 30.0


def chat(name: str, content: str = "one two three", **fields: Any) -> dict[str, Any]:
    """A line that asks for a few tokens."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, **fields}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


def jsonl(lines: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@contextlib.asynccontextmanager
async def serving(
    folder: Path, files: Path, options: dict[str, Any], **settings: Any
) -> AsyncIterator[tuple[Parts, AsyncOpenAI]]:
    config = Config(model="/models/fake", engine="thread", files_dir=str(files), **settings)
    async with running(folder, config, **options) as parts, client_of(parts.app) as http:
        key = settings.get("api_key", "none")
        yield parts, AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=http, max_retries=0)


@pytest.fixture
async def server(
    folder: Path, tmp_path: Path, runner_options: dict[str, Any]
) -> AsyncIterator[tuple[Parts, AsyncOpenAI]]:
    async with serving(folder, tmp_path, runner_options) as found:
        yield found


@pytest.fixture
def sdk(server: tuple[Parts, AsyncOpenAI]) -> AsyncOpenAI:
    return server[1]


async def begun(sdk: AsyncOpenAI, lines: bytes | Iterable[Any], endpoint: Any = CHAT, **fields: Any) -> Batch:
    data = lines if isinstance(lines, bytes) else jsonl(lines)
    file = await sdk.files.create(file=("in.jsonl", data), purpose="batch")
    options: dict[str, Any] = {"completion_window": "24h", **fields}
    return await sdk.batches.create(input_file_id=file.id, endpoint=endpoint, **options)


async def reached(sdk: AsyncOpenAI, batch_id: str, holds: Callable[[Batch], object]) -> Batch:
    async with asyncio.timeout(TIMEOUT_S):
        while not holds(found := await sdk.batches.retrieve(batch_id)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return found


async def ended(sdk: AsyncOpenAI, batch: Batch) -> Batch:
    return await reached(sdk, batch.id, lambda found: found.status in ENDED)


async def lines_of(sdk: AsyncOpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    return [json.loads(line) for line in (await sdk.files.content(file_id)).content.splitlines()]


# ---- files ----


async def test_uploaded_file_is_returned_as_it_was(sdk: AsyncOpenAI) -> None:
    data = jsonl([chat("a")]) * 3000
    file = await sdk.files.create(file=("requests.jsonl", data), purpose="batch")
    assert (file.object, file.filename, file.purpose, file.bytes) == ("file", "requests.jsonl", "batch", len(data))
    assert file.expires_at == file.created_at + 30 * 86_400
    assert await sdk.files.retrieve(file.id) == file
    assert (await sdk.files.content(file.id)).content == data
    assert (await sdk.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await sdk.files.content(file.id)


async def test_files_are_listed_in_pages(sdk: AsyncOpenAI) -> None:
    made = [(await sdk.files.create(file=(f"{i}", b"{}"), purpose="batch")).id for i in range(5)]
    page = await sdk.files.list(limit=2)
    assert ([file.id for file in page.data], page.has_more) == (made[:2:-1], True)
    assert [file.id async for file in sdk.files.list(limit=2)] == made[::-1]
    assert [file.id async for file in sdk.files.list(limit=2, order="asc", after=made[1])] == made[2:]
    assert (await sdk.files.list(purpose="batch_output")).data == []


async def test_file_is_gone_when_it_has_expired(
    server: tuple[Parts, AsyncOpenAI], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sdk = server
    policy: Any = {"anchor": "created_at", "seconds": 3600}
    file = await sdk.files.create(file=("x", b"{}"), purpose="batch", expires_after=policy)
    assert file.expires_at == file.created_at + 3600
    monkeypatch.setattr("vllm_mlx.api.batches.files.time.time", lambda: file.created_at + 3600)
    with pytest.raises(openai.NotFoundError):
        await sdk.files.retrieve(file.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "assistants"}, "purpose"),
        ({"purpose": "nonsense"}, "purpose"),
        ({"purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after.seconds"),
        ({"purpose": "batch", "extra_body": {"colour": "red"}}, "colour"),
    ],
)
async def test_wrong_upload_names_the_field(sdk: AsyncOpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.files.create(file=("x", b"{}"), **fields)
    assert caught.value.param == param


async def test_upload_without_file_is_refused(server: tuple[Parts, AsyncOpenAI]) -> None:
    async with client_of(server[0].app) as http:
        answers = [
            await http.post("/v1/files", json={"purpose": "batch"}),
            await http.post("/v1/files", files={"other": b"x"}, data={"purpose": "batch"}),
            await http.post("/v1/files", content=b"--x\r\nbroken", headers={"content-type": "multipart/form-data"}),
        ]
    assert [answer.status_code for answer in answers] == [400, 400, 400]


async def test_too_large_file_is_refused(folder: Path, tmp_path: Path, runner_options: dict[str, Any]) -> None:
    async with serving(folder, tmp_path, runner_options, files_max_mb=1) as (_, sdk):
        with pytest.raises(openai.APIStatusError) as caught:
            await sdk.files.create(file=("x", b"x" * 1_200_000), purpose="batch")
    assert caught.value.status_code == 413
    assert not list((tmp_path / "contents").glob("*") if (tmp_path / "contents").exists() else ())


# ---- batches ----


async def test_lines_get_the_answers_of_the_endpoint(server: tuple[Parts, AsyncOpenAI]) -> None:
    parts, sdk = server
    batch = await begun(sdk, [chat(f"r{i}", f"count {i}") for i in range(20)], metadata={"for": "me"})
    assert (batch.object, batch.endpoint, batch.metadata) == ("batch", CHAT, {"for": "me"})
    done = await ended(sdk, batch)
    assert (done.status, done.error_file_id, done.errors) == ("completed", None, None)
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 20, "completed": 20, "failed": 0}
    answers = {line["custom_id"]: line for line in await lines_of(sdk, done.output_file_id)}
    assert list(answers) == [f"r{i}" for i in range(20)]
    line = answers["r7"]
    assert (line["error"], line["response"]["status_code"]) == (None, 200)
    asked: Any = chat("", "count 7")["body"]
    direct = await sdk.chat.completions.create(model="default", **asked)
    assert line["response"]["body"]["choices"] == direct.model_dump(exclude_unset=True)["choices"]
    assert done.usage is not None
    assert done.usage.output_tokens == 80
    assert done.usage.total_tokens == done.usage.input_tokens + 80
    output = await sdk.files.retrieve(done.output_file_id or "")
    assert output.purpose == "batch_output"
    await parts.idle()


async def test_completions_run_in_batches(sdk: AsyncOpenAI) -> None:
    body = {"prompt": ["one", "two"], "max_tokens": 3, "n": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    done = await ended(sdk, await begun(sdk, [line], "/v1/completions"))
    [answer] = await lines_of(sdk, done.output_file_id)
    assert len(answer["response"]["body"]["choices"]) == 4


async def test_failed_lines_go_to_the_error_file_as_the_endpoint_answers_them(sdk: AsyncOpenAI) -> None:
    lines = [chat("good"), chat("hot", temperature=9), chat("other", model="nobody"), chat("flow", stream=True)]
    done = await ended(sdk, await begun(sdk, lines))
    assert done.status == "completed"
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 3)
    failed = {line["custom_id"]: line["response"] for line in await lines_of(sdk, done.error_file_id)}
    assert {name: answer["status_code"] for name, answer in failed.items()} == {"hot": 400, "other": 404, "flow": 400}
    assert [failed[name]["body"]["error"]["param"] for name in ("hot", "other", "flow")] == [
        "temperature",
        "model",
        "stream",
    ]


async def test_wrong_lines_fail_the_batch_before_anything_runs(server: tuple[Parts, AsyncOpenAI]) -> None:
    parts, sdk = server
    data = b"".join(
        [
            jsonl([chat("a")]),
            b"\n{broken\n[]\n",
            jsonl([chat("a"), {**chat("b"), "url": "/v1/completions"}, {**chat("c"), "method": "GET"}]),
            jsonl(
                [{**chat("d"), "more": 1}, {"custom_id": "e", "method": "POST", "url": CHAT}, {**chat("f"), "body": 1}]
            ),
            jsonl([{**chat("g"), "custom_id": 5}]),
        ]
    )
    done = await ended(sdk, await begun(sdk, data))
    assert (done.status, done.output_file_id, done.error_file_id) == ("failed", None, None)
    assert done.errors is not None
    assert [(error.line, error.code, error.param) for error in done.errors.data or ()] == [
        (3, "invalid_json_line", None),
        (4, "invalid_json_line", None),
        (5, "duplicate_custom_id", "custom_id"),
        (6, "invalid_url", "url"),
        (7, "invalid_method", "method"),
        (8, "invalid_request", None),
        (9, "missing_required_parameter", "body"),
        (10, "invalid_request", "body"),
        (11, "invalid_request", None),
    ]
    runner = parts.factory.runner
    assert runner is not None
    assert parts.status().stats.num_tokens == 0
    empty = await ended(sdk, await begun(sdk, b"\n \n"))
    assert empty.errors is not None
    assert [error.code for error in empty.errors.data or ()] == ["empty_file"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": "/v1/files"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
async def test_wrong_batch_names_the_field(sdk: AsyncOpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await begun(sdk, [chat("a")], **fields)
    assert caught.value.param == param


async def test_batch_needs_an_input_file(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    assert caught.value.param == "input_file_id"
    done = await ended(sdk, await begun(sdk, [chat("a")]))
    with pytest.raises(openai.BadRequestError):
        await sdk.batches.create(input_file_id=done.output_file_id or "", endpoint=CHAT, completion_window="24h")


async def test_batches_are_listed_in_pages(sdk: AsyncOpenAI) -> None:
    made = [(await begun(sdk, [chat("a")])).id for _ in range(3)]
    assert [batch.id async for batch in sdk.batches.list(limit=2)] == made[::-1]
    assert [batch.id for batch in (await sdk.batches.list(after=made[2], limit=1)).data] == [made[1]]
    with pytest.raises(openai.NotFoundError):
        await sdk.batches.list(after="batch_none")
    with pytest.raises(openai.BadRequestError):
        await sdk.batches.list(limit=0)
    await asyncio.gather(*(reached(sdk, name, lambda found: found.status in ENDED) for name in made))


async def test_cancelled_batch_keeps_what_was_done(folder: Path, tmp_path: Path, runner_options: Any) -> None:
    slow = {**runner_options, "step_s": 0.01}
    async with serving(folder, tmp_path, slow, batch_concurrency=1) as (parts, sdk):
        batch = await begun(sdk, [chat(f"r{i}") for i in range(50)])
        running_file = batch.input_file_id
        await reached(sdk, batch.id, lambda found: found.request_counts.completed >= 2)
        with pytest.raises(openai.ConflictError):
            await sdk.files.delete(running_file)
        assert (await sdk.batches.cancel(batch.id)).status in ("cancelling", "cancelled")
        done = await ended(sdk, batch)
        assert done.status == "cancelled"
        assert done.cancelled_at is not None
        outputs, errors = await lines_of(sdk, done.output_file_id), await lines_of(sdk, done.error_file_id)
        assert 2 <= len(outputs) < 50
        assert [line["custom_id"] for line in (*outputs, *errors)] == [f"r{i}" for i in range(50)]
        assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
        assert (await sdk.batches.cancel(batch.id)).status == "cancelled"
        await parts.idle()
        await sdk.files.delete(running_file)


async def test_ended_batch_cannot_be_cancelled(sdk: AsyncOpenAI) -> None:
    done = await ended(sdk, await begun(sdk, [chat("a")]))
    with pytest.raises(openai.ConflictError):
        await sdk.batches.cancel(done.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.batches.cancel("batch_none")


async def test_batch_expires(
    folder: Path, tmp_path: Path, runner_options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_mlx.api.batches.store.window_s", lambda text: 1)
    slow = {**runner_options, "step_s": 0.02}
    async with serving(folder, tmp_path, slow, batch_concurrency=1) as (_, sdk):
        done = await ended(sdk, await begun(sdk, [chat(f"r{i}") for i in range(200)]))
        assert done.status == "expired"
        errors = await lines_of(sdk, done.error_file_id)
        assert {line["error"]["code"] for line in errors} == {"batch_expired"}
        assert done.request_counts is not None
        assert done.request_counts.failed == len(errors)
        assert done.request_counts.completed + len(errors) == 200


async def test_restarted_server_goes_on_where_the_last_one_stopped(
    folder: Path, tmp_path: Path, runner_options: Any
) -> None:
    slow = {**runner_options, "step_s": 0.01}
    async with serving(folder, tmp_path, slow, batch_concurrency=2) as (_, sdk):
        batch = await begun(sdk, [chat(f"r{i}") for i in range(30)])
        before = await reached(sdk, batch.id, lambda found: found.request_counts.completed >= 3)
    store = Store(tmp_path)
    kept = store.get(batch.id).request_counts.completed
    store.close()
    assert before.request_counts is not None
    assert before.request_counts.completed <= kept < 30
    async with serving(folder, tmp_path, runner_options) as (parts, sdk):
        parts.app.state.batches.runner.resume()
        done = await ended(sdk, batch)
        assert done.request_counts is not None
        assert done.request_counts.model_dump() == {"total": 30, "completed": 30, "failed": 0}
        names = [line["custom_id"] for line in await lines_of(sdk, done.output_file_id)]
        assert names == [f"r{i}" for i in range(30)]
        # What was kept is not computed again.
        assert parts.status().stats.num_tokens < 30 * 40


_CHILD = """
import sys, time
from pathlib import Path
from fixtures_server import LiveServer
from fixtures_text import WordScript, write_tokenizer
from vllm_mlx.core.config import Config

folder, files = map(Path, sys.argv[1:])
backend = write_tokenizer(folder)
config = Config(model="/models/fake", engine="thread", files_dir=str(files), batch_concurrency=2)
options = {"script": WordScript(backend), "vocab_size": backend.get_vocab_size(), "max_model_len": 512}
with LiveServer(folder, config, **options, step_s=0.02) as server:
    print(server.url, flush=True)
    time.sleep(120)
"""


async def test_batch_survives_a_kill(folder: Path, tmp_path: Path, runner_options: Any) -> None:
    files = tmp_path / "files"
    arguments = [sys.executable, "-c", _CHILD, str(folder), str(files)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE, env=environment)
    try:
        assert child.stdout is not None
        url = (await child.stdout.readline()).decode().strip()
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
            batch = await begun(sdk, [chat(f"r{i}") for i in range(40)])
            seen = await reached(sdk, batch.id, lambda found: found.request_counts.completed >= 3)
    finally:
        child.kill()
        await child.wait()
    async with serving(folder, files, runner_options) as (parts, sdk):
        assert seen.request_counts is not None
        found = await sdk.batches.retrieve(batch.id)
        assert found.request_counts is not None
        assert seen.request_counts.completed <= found.request_counts.completed < 40
        parts.app.state.batches.runner.resume()
        done = await ended(sdk, batch)
        assert done.status == "completed"
        names = [line["custom_id"] for line in await lines_of(sdk, done.output_file_id)]
        assert names == [f"r{i}" for i in range(40)]


async def test_other_models_batches_are_left_alone(folder: Path, tmp_path: Path, runner_options: Any) -> None:
    async with serving(folder, tmp_path, runner_options, served_model_name="other") as (parts, sdk):
        await parts.app.state.batches.runner.stop()
        batch = await begun(sdk, [chat("a")])
    async with serving(folder, tmp_path, runner_options) as (_, sdk):
        own = await ended(sdk, await begun(sdk, [chat("a")]))
        assert own.status == "completed"
        assert (await sdk.batches.retrieve(batch.id)).status == "validating"


async def test_api_key_guards_files_but_not_the_lines(folder: Path, tmp_path: Path, runner_options: Any) -> None:
    async with serving(folder, tmp_path, runner_options, api_key="sk-x") as (_, sdk):
        done = await ended(sdk, await begun(sdk, [chat("a")]))
        assert done.status == "completed"
        with pytest.raises(openai.AuthenticationError):
            await sdk.with_options(api_key="wrong").files.list()


async def test_interactive_requests_go_first(folder: Path, tmp_path: Path, runner_options: Any) -> None:
    slow = {**runner_options, "step_s": 0.005}
    async with serving(folder, tmp_path, slow, max_num_seqs=2, batch_concurrency=4) as (_, sdk):
        batch = await begun(sdk, [chat(f"r{i}", max_tokens=40) for i in range(20)])
        await reached(sdk, batch.id, lambda found: found.request_counts.completed)
        messages: Any = [{"role": "user", "content": "hello"}]
        await asyncio.gather(
            *(sdk.chat.completions.create(model="default", messages=messages, max_tokens=4) for _ in range(4))
        )
        found = await sdk.batches.retrieve(batch.id)
        assert found.request_counts is not None
        assert found.request_counts.completed < 20
        await sdk.batches.cancel(batch.id)
        await ended(sdk, batch)


async def test_lines_have_the_lowest_priority(
    server: tuple[Parts, AsyncOpenAI], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, sdk = server
    submitted: list[Submit] = []
    generate = parts.engine.generate

    def noted(submit: Submit) -> Any:
        submitted.append(submit)
        return generate(submit)

    monkeypatch.setattr(parts.engine, "generate", noted)
    await ended(sdk, await begun(sdk, [chat("a")]))
    await sdk.completions.create(model="default", prompt="one", max_tokens=2)
    line, interactive = submitted
    assert line.priority < -(2**29) < interactive.priority
