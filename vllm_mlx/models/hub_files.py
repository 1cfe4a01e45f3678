"""Large files of a hub repository, fetched so that even a killed download goes on where it stopped.

huggingface_hub begins an unfinished file anew in every process. So files above `MIN_BYTES` are fetched here, into
the place in the hub's cache where `snapshot_download` then finds them: `blobs/<etag>`, as its documentation of the
cache describes. https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import DryRunFileInfo, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.file_download import http_get, repo_folder_name
from tqdm import tqdm  # type: ignore[import-untyped]

MIN_BYTES = 1 << 20
NUM_WORKERS = 4
SHA256 = re.compile("[0-9a-f]{64}")


class Meter:
    """Counts bytes on disk over all files and threads; tells now and then."""

    def __init__(self, total: int, tell: Callable[[int, int], None]) -> None:
        self.total = total
        self._tell = tell
        self._done = 0
        self._told_at = 0.0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        """More bytes (fewer, if negative) are on disk."""
        with self._lock:
            self._done += num_bytes
            if time.monotonic() - self._told_at > 0.1 or self._done >= self.total:
                self._told_at = time.monotonic()
                self._tell(self._done, self.total)

    def pulse(self) -> None:
        """Nothing new, but all is well."""
        with self._lock:
            self._tell(self._done, self.total)

    def bar_class(self) -> type[tqdm]:
        """A progress bar that shows nothing and counts here; what huggingface_hub takes as `tqdm_class`."""
        meter = self

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                # Of the two byte bars one counts the network, the other the disk.
                self.counts = self.unit == "B" and not str(self.desc).startswith("Download")
                self.update(0)
                if self.counts and self.initial:
                    meter.add(int(self.initial))

            def update(self, n: float | None = 1) -> None:
                super().update(n)
                if self.counts and n:
                    meter.add(int(n))

            def display(self, msg: str | None = None, pos: int | None = None) -> None:
                pass

            def close(self) -> None:
                self.disable = True

        return Bar


def fetch_large_files(repo_id: str, files: list[DryRunFileInfo], meter: Meter) -> None:
    """Bring those of `files` into the hub's cache that are large and not there yet."""
    wanted = [file for file in files if file.will_download and _is_large(file.file_size)]
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for job in [pool.submit(_fetch, repo_id, file, meter) for file in wanted]:
            job.result()


def _is_large(size: int | None) -> bool:
    """The library refuses plain transfers above its limit: those are left to it."""
    return size is not None and MIN_BYTES <= size <= constants.MAX_HTTP_DOWNLOAD_SIZE


def _fetch(repo_id: str, file: DryRunFileInfo, meter: Meter) -> None:
    url = hf_hub_url(repo_id, file.filename, revision=file.commit_hash)
    etag = get_hf_file_metadata(url).etag
    if etag is None:
        return
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    blob, part = blobs / etag, blobs / f"{etag}.vllm-mlx.part"
    lock = FileLock(blobs / f"{etag}.vllm-mlx.lock")
    while not blob.exists():
        try:
            with lock.acquire(timeout=1):
                _transfer(url, blob, part, size=file.file_size or 0, meter=meter)
        except Timeout:  # another process fetches it
            meter.pulse()


def _transfer(url: str, blob: Path, part: Path, *, size: int, meter: Meter) -> None:
    resumed = part.stat().st_size if part.exists() else 0
    if resumed > size:
        part.unlink()
        resumed = 0
    token = get_token()
    with part.open("ab") as target:
        http_get(
            url,
            target,
            resume_size=resumed,
            headers={"authorization": f"Bearer {token}"} if token else {},
            expected_size=size,
            tqdm_class=meter.bar_class(),
        )
    # A large file's etag is its sha256; a file made of several transfers is compared with it.
    if resumed and SHA256.fullmatch(blob.name) and _sha256(part, meter) != blob.name:
        part.unlink()
        raise OSError(f"{blob.name}: the parts do not make the whole; it is fetched again")
    part.rename(blob)


def _sha256(path: Path, meter: Meter) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            meter.pulse()
    return digest.hexdigest()
