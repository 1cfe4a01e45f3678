#!/bin/sh
# Writes requirements/*.txt: every package with its hashes, no index address. Usage: tools/lock.sh UV [uv options]
set -eu
cd "$(dirname "$0")/.."
uv=$1
shift

compile() { # compile NAME SOURCE [options]
    name=$1 source=$2
    shift 2
    "$uv" pip compile "$source" --output-file "requirements/$name.txt" --universal --python-version 3.11 \
        --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet "$@"
    echo "requirements/$name.txt"
}

compile uv requirements/uv.in "$@"
compile metal pyproject.toml --group dev "$@"
for backend in cpu cuda12 cuda13; do
    compile "$backend" pyproject.toml --group dev --extra "$backend" "$@"
done
if grep -nE '://|--(extra-)?index-url|--find-links' requirements/*.txt; then
    echo "lock files must not contain addresses" >&2
    exit 1
fi
