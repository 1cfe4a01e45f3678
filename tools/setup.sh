#!/bin/sh
# Makes .venv: the locked packages for this machine's backend, and this package in place. Does nothing when it is current.
# BACKEND=metal|cpu|cuda12|cuda13 overrides the choice; PYTHON=... the interpreter.
set -eu
cd "$(dirname "$0")/.."

choose_backend() {
    if [ "$(uname -s)" = Darwin ]; then
        if [ "$(uname -m)" = arm64 ]; then echo metal; else fail "MLX needs Apple Silicon (arm64) on macOS"; fi
        return
    fi
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1) || driver=
    case $driver in
        '' | *[!0-9]*) echo cpu ;;
        *) if [ "$driver" -ge 580 ]; then echo cuda13; elif [ "$driver" -ge 525 ]; then echo cuda12; else echo cpu; fi ;;
    esac
}

find_python() {
    for candidate in ${PYTHON:-python3.12 python3.11 python3.13 python3.14 python3}; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with the venv module found (PYTHON=/path/to/python3.11 names one)"
}

fail() {
    echo "vllm-mlx: error: $1" >&2
    exit 2
}

backend=${BACKEND:-$(choose_backend)}
lock=requirements/$backend.txt
[ -f "$lock" ] || fail "BACKEND must be metal, cpu, cuda12 or cuda13, not '$backend'"
state="$backend $(cat "$lock" requirements/uv.txt pyproject.toml tools/setup.sh | cksum) $(pwd -P)"
if [ -f .venv/state ] && [ "$(cat .venv/state)" = "$state" ] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

python=$(find_python)
echo "Setting up .venv with $("$python" --version), backend $backend (once; takes a minute)"
rm -f .venv/state
.venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
# uv does not read pip's settings: a mirror named for pip serves uv too
if [ -n "${PIP_INDEX_URL:-}" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    export UV_DEFAULT_INDEX="$PIP_INDEX_URL"
fi
.venv/bin/uv pip sync --quiet --python .venv/bin/python --require-hashes "$lock"
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
echo "$state" >.venv/state
