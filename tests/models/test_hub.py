"""Downloads through huggingface_hub from a small server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from vllm_mlx.core.config import Config
from vllm_mlx.core.errors import ModelError
from vllm_mlx.models.resolve import resolve

REPO, COMMIT = "owner/tiny", "a" * 40
WEIGHTS = save({"w": np.arange(500_000, dtype=np.float32)})


class Hub:
    """A hub with one repository. Knobs say how it misbehaves; `log` holds (method, path, headers)."""

    def __init__(self) -> None:
        self.files = {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b'{"version": "1.0"}',
            "model.safetensors": WEIGHTS,
            "own.py": b"raise SystemExit('was run')",
            "pytorch_model.bin": b"x" * 1000,
            "model.gguf": b"GGUF",
        }
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.status: int | None = None
        self.error_code: str | None = None
        self.token: str | None = None
        self.cut_after: int | None = None
        """Break off the first transfer of the weights after this many bytes."""
        self.stall_s = 0.0
        """Wait this long where the transfer breaks off."""
        self.file_status: int | None = None

    def ranges(self) -> list[str | None]:
        """Range header of each transfer of the weights."""
        return [
            headers.get("range") for method, path, headers in self.log if (method, path[-11:]) == ("GET", "safetensors")
        ]


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.log.append((self.command, self.path.partition("?")[0], headers))
            if hub.token and headers.get("authorization") != f"Bearer {hub.token}":
                return self.fail(401, "GatedRepo" if hub.error_code else None)
            if hub.status:
                return self.fail(hub.status, hub.error_code)
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{REPO}/tree/"):
                return self.send_json(
                    [{"type": "file", "path": n, "size": len(d), "oid": oid(d)} for n, d in hub.files.items()]
                )
            if path.startswith(f"/api/models/{REPO}"):
                if path.split("/revision/")[-1] not in ("main", "v2", COMMIT):
                    return self.fail(404, "RevisionNotFound")
                return self.send_json({"id": REPO, "modelId": REPO, "sha": COMMIT, "private": False, "siblings": []})
            name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
            if name not in hub.files:
                return self.fail(404, "RepoNotFound" if "/api/models/" in path else "EntryNotFound")
            if hub.file_status:
                return self.fail(hub.file_status, hub.error_code)
            return self.send_file(name, headers.get("range"), body=body)

        def fail(self, status: int, code: str | None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", "no")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_json(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def send_file(self, name: str, wanted: str | None, *, body: bool) -> None:
            data = hub.files[name]
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", f'"{oid(data)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if not body:
                return
            if hub.cut_after is not None and name == "model.safetensors":
                end, hub.cut_after = start + hub.cut_after, None
                self.wfile.write(data[start:end])
                self.wfile.flush()
                time.sleep(hub.stall_s)
                self.close_connection = True
                return
            self.wfile.write(data[start:])

    return Handler


def resumed_at(hub: Hub) -> int:
    """First byte of the last transfer of the weights; that there is one means that it was resumed."""
    wanted = hub.ranges()[-1]
    assert wanted is not None
    return int(wanted.removeprefix("bytes=").rstrip("-"))


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients that are killed hang up
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield made
    server.shutdown()
    server.server_close()


def get(**settings: Any) -> tuple[Path, list[tuple[str, float | None]]]:
    said: list[tuple[str, float | None]] = []
    config = Config(**{"model": REPO, "download_timeout": 10, "download_retries": 0, **settings})
    files = resolve(config, progress=lambda text, fraction=None: said.append((text, fraction)))
    assert files.source == "hub"
    return files.path, said


def refused(**settings: Any) -> str:
    with pytest.raises(ModelError) as raised:
        get(**settings)
    assert "\n" not in raised.value.message
    assert settings.get("model", REPO) in raised.value.message
    return raised.value.message


def test_only_what_is_needed_is_downloaded_and_only_once(hub: Hub) -> None:
    path, said = get()
    assert {file.name for file in path.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert said[-1][0].startswith(f"downloading {REPO}")
    assert said[-1][1] == 1.0
    num_transfers = len(hub.ranges())
    assert get()[0] == path
    assert len(hub.ranges()) == num_transfers == 1


def test_downloaded_model_is_found_offline_and_without_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = get(trust_remote_code=True)
    assert (path / "own.py").exists()
    hub.log.clear()
    assert get(offline=True)[0] == path
    assert hub.log == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert get()[0] == path


def test_transfer_that_breaks_off_is_resumed(hub: Hub) -> None:
    hub.cut_after = 1_000_000
    path, _ = get()
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges()[0] is None
    assert 500_000 < resumed_at(hub) <= 1_000_000


def test_silent_download_fails_and_the_next_start_goes_on_where_it_stopped(hub: Hub) -> None:
    hub.cut_after, hub.stall_s = 1_000_000, 30.0
    message = refused(download_timeout=1)
    assert "check the network" in message
    path, _ = get()
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert 500_000 < resumed_at(hub) <= 1_000_000


def test_unknown_model_is_said(hub: Hub) -> None:
    hub.status, hub.error_code = 404, "RepoNotFound"
    assert "no such model" in refused(download_retries=3)


def test_unknown_revision_is_said(hub: Hub) -> None:
    assert "no revision v3" in refused(revision="v3")


def test_gated_model_names_the_remedy_and_the_token_opens_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token, hub.error_code = "secret", "GatedRepo"
    message = refused()
    assert "gated" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert get()[0].name == COMMIT


def test_gated_file_is_said_though_the_listing_is_open(hub: Hub) -> None:
    hub.file_status, hub.error_code = 403, "GatedRepo"
    assert "gated" in refused()


def test_server_error_is_tried_again(hub: Hub) -> None:
    hub.file_status = 500
    threading.Timer(0.7, lambda: setattr(hub, "file_status", None)).start()
    assert get(download_retries=3)[0].name == COMMIT


def test_not_cached_and_offline_says_so(hub: Hub) -> None:
    assert "--offline" in refused(offline=True)
    assert hub.log == []


def test_unreachable_hub_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = refused()
    assert "cannot be downloaded" in message
    assert "check the network" in message


def test_waiting_callback_may_stop_the_download(hub: Hub) -> None:
    """Ctrl-C arrives in the callback: the child is ended, not left behind."""
    seen: list[Callable[..., None]] = []

    def stop(text: str, fraction: float | None = None) -> None:
        seen.append(stop)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(Config(model=REPO), progress=stop)
    assert len(seen) == 1
