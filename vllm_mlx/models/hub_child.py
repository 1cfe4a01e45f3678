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

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm  # type: ignore[import-untyped]


def report(**values: Any) -> None:
    """One line to the parent."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


class ReportingBar(tqdm):  # type: ignore[misc]
    """A progress bar that shows nothing and reports the bytes that are on disk."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm now and then, from the thread that made progress."""
        if self.unit == "B" and not str(self.desc).startswith("Download"):
            report(done=int(self.n), total=int(self.total or 0))

    def close(self) -> None:
        """Nothing is drawn, so nothing is to be cleared."""
        self.disable = True


def run(job: dict[str, Any]) -> None:
    """Download, and report the folder or what kind of failure it was."""
    try:
        path = snapshot_download(**job, tqdm_class=ReportingBar)
    except GatedRepoError as error:
        report(kind="gated", reason=str(error))
    except RepositoryNotFoundError as error:
        report(kind="not_found", reason=str(error))
    except RevisionNotFoundError as error:
        report(kind="revision", reason=str(error))
    except LocalEntryNotFoundError as error:
        report(**_not_cached(error, job))
    except HfHubHTTPError as error:
        kind = "token" if error.response.status_code in (401, 403) else "network"
        report(kind=kind, reason=_first_line(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
        report(kind="disk" if full else "network", reason=_first_line(error))
    else:
        report(path=path)


def _not_cached(error: LocalEntryNotFoundError, job: dict[str, Any]) -> dict[str, str]:
    offline = job["local_files_only"] or os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    cause: BaseException = error.__cause__ or error
    return {"kind": "offline" if offline else "network", "reason": _first_line(cause)}


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
