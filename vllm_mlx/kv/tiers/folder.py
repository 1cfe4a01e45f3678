"""The folder of a tier: where files lie, and how they are written, read, found and deleted.

Layout: DIR/<model and key: 32 hex digits>/<2 hex digits>/<name: 32 hex digits>.<kind>
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vllm_mlx.kv.tiers.record import HEADER_BYTES, Kind

_SUFFIXES = {Kind.PAGE: "page", Kind.CHECKPOINT: "state"}
_MODEL = re.compile(r"[0-9a-f]{32}")
_SHARD = re.compile(r"[0-9a-f]{2}")
_BLOB = re.compile(r"[0-9a-f]{32}\.(page|state)")
_TEMPORARY = re.compile(r"[0-9a-f]{32}\.(page|state)\.[0-9a-f]{16}\.tmp")
_DISCARDED = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{16}\.gone")
_TEMPORARY_AGE_S = 600.0
"""A temporary file that is younger may still be written by another server."""


class FoundFile(NamedTuple):
    """A blob that a scan came across; `path` is relative to the folder."""

    path: str
    size_bytes: int
    dated_ns: int


def model_folder(fingerprint: bytes, key: bytes | None) -> str:
    """Name of the sub-folder of a model; each key has its own, so that no key ever meets what another has sealed."""
    return hashlib.blake2b(fingerprint, key=key, digest_size=16).hexdigest() if key else fingerprint.hex()


class BlobFolder:
    """Files of blobs below `root`, those of this model in the sub-folder `model`. Every method may raise OSError."""

    def __init__(self, root: Path, *, model: str, clock: Callable[[], float]) -> None:
        self._root = root
        self._model = model
        self._clock = clock

    def path(self, kind: Kind, name: bytes) -> str:
        """Where this model's blob of that name lies, relative to the folder."""
        digits = name.hex()
        return f"{self._model}/{digits[:2]}/{digits}.{_SUFFIXES[kind]}"

    def is_own(self, path: str) -> bool:
        """Whether a file is this model's."""
        return path.startswith(f"{self._model}/")

    def prepare(self, path: str) -> None:
        """Make the folders above a file, closed to other users."""
        shard = (self._root / path).parent
        for parent in (self._root, shard.parent, shard):  # one by one: `mode` is for the last only
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, path: str, parts: Iterable[bytes | memoryview]) -> int:
        """Write a file that is there as a whole or not at all, even if this process is killed; returns its date.

        The file is synced before it gets its name, so that errors of a disk that writes late are seen here. The folder
        is not: a name that a power cut takes away is a miss.
        """
        target = self._root / path
        temporary = target.with_name(f"{target.name}.{os.urandom(8).hex()}.tmp")
        now_ns = int(self._clock() * 1e9)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(descriptor)
            os.utime(temporary, ns=(now_ns, now_ns))
            temporary.replace(target)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        return now_ns

    def read(self, path: str, *, max_bytes: int) -> tuple[bytes, bytes]:
        """Header and stored payload; either is short if the file is, and the payload is cut if it is longer."""
        with (self._root / path).open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size  # `read` sets aside all that it is asked for
            return file.read(HEADER_BYTES), file.read(max(0, min(size_bytes - HEADER_BYTES, max_bytes)))

    def delete(self, path: str) -> None:
        """Delete a file; one that is gone already is fine."""
        (self._root / path).unlink(missing_ok=True)

    def set_date(self, path: str, at_ns: int) -> None:
        """Date a file, so that the order of use survives a restart; a disk that refuses keeps the old order."""
        with suppress(OSError):
            os.utime(self._root / path, ns=(at_ns, at_ns))

    def free_bytes(self) -> int:
        """Space that is left on the disk."""
        return shutil.disk_usage(self._root).free

    def discard_model(self) -> None:
        """Delete every file of this model, by whichever server it was written.

        One rename takes them all out of reach; what a kill leaves of them is deleted by the next scan.
        """
        discarded = self._root / f"{self._model}.{os.urandom(8).hex()}.gone"
        with suppress(FileNotFoundError):
            (self._root / self._model).rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)

    def scan(self) -> Iterator[list[FoundFile]]:
        """Blobs of all models, one sub-folder of a sub-folder at a time; deletes what broken-off writes have left.

        A folder that cannot be listed does not keep the others from being looked at; its error comes last.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        errors: list[OSError] = []
        for model in _entries(self._root, errors):
            if _DISCARDED.fullmatch(model.name):
                shutil.rmtree(model, ignore_errors=True)
            elif _MODEL.fullmatch(model.name):
                for shard in _entries(self._root / model.name, errors):
                    if _SHARD.fullmatch(shard.name):
                        yield self._blobs(f"{model.name}/{shard.name}", errors)
        if errors:
            raise errors[0]

    def _blobs(self, shard: str, errors: list[OSError]) -> list[FoundFile]:
        """What lies in one sub-folder; a file that vanishes meanwhile is left out."""
        found = []
        for entry in _entries(self._root / shard, errors):
            is_blob = _BLOB.fullmatch(entry.name)
            if not is_blob and not _TEMPORARY.fullmatch(entry.name):
                continue
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if is_blob and stat.S_ISREG(status.st_mode):
                    found.append(FoundFile(f"{shard}/{entry.name}", status.st_size, status.st_mtime_ns))
                elif not is_blob and time.time() - status.st_mtime > _TEMPORARY_AGE_S:
                    self.delete(f"{shard}/{entry.name}")
        return found


def _entries(folder: Path, errors: list[OSError]) -> list[os.DirEntry[str]]:
    """What lies in a folder; nothing if it is gone, no folder, or cannot be listed, which is added to `errors`."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        errors.append(error)
        return []
