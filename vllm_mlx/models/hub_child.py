"""The child that downloads: `python -m vllm_mlx.models.hub_child JOB`, reports as JSON lines on standard output.

{"done": bytes, "total": bytes} while it goes on; at the end {"path": folder} or {"kind": ..., "reason": ...}.
An error that is not named here ends the process; its last line on standard error is the reason.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vllm_mlx.models.hub_files import Meter, fetch_large_files

CHUNK_BYTES = 1 << 18


def report(**values: Any) -> None:
    """One line to the parent."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def run(job: dict[str, Any]) -> None:
    """Download, and report the folder or what kind of failure it was."""
    # The library counts and keeps bytes by the chunk; with its 10 MB a slow line would look like a dead one.
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    try:
        report(path=_download(job))
    except GatedRepoError as error:
        report(kind="gated", reason=_first_line(error))
    except RepositoryNotFoundError as error:
        report(kind="not_found", reason=_first_line(error))
    except RevisionNotFoundError as error:
        report(kind="revision", reason=_first_line(error))
    except LocalEntryNotFoundError as error:
        report(**_not_cached(error, job))
    except HfHubHTTPError as error:
        kind = "token" if error.response.status_code in (401, 403) else "network"
        report(kind=kind, reason=_first_line(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
        report(kind="disk" if full else "network", reason=_first_line(error))


def _download(job: dict[str, Any]) -> str:
    meter = Meter(0, lambda done, total: report(done=done, total=total))
    if not job["local_files_only"]:
        try:
            files = snapshot_download(**job, dry_run=True, tqdm_class=meter.bar_class())
        except DryRunError:  # the hub does not answer: what is in the cache may do, and else the next call says why
            files = []
        meter.total = sum(file.file_size or 0 for file in files if file.will_download)
        fetch_large_files(job["repo_id"], files, meter)
    path: str = snapshot_download(**job, tqdm_class=meter.bar_class())
    return path


def _not_cached(error: LocalEntryNotFoundError, job: dict[str, Any]) -> dict[str, str]:
    offline = job["local_files_only"] or os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    cause: BaseException = error.__cause__ or error
    return {"kind": "offline" if offline else "network", "reason": _first_line(cause)}


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
