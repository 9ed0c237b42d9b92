#!/usr/bin/env bash
# Create .venv and install the project into it, with the versions of constraints.txt. Does nothing
# if that is already done. PYTHON chooses the interpreter (3.11 or newer), VENV another folder, and
# CONSTRAINTS another file of versions.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-constraints.txt}
installed=$venv/installed
wanted=$(cat pyproject.toml "$constraints" | cksum)
if [[ -f $installed && $(<"$installed") == "$wanted" ]]; then
    exit 0
fi
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python must be 3.11 or newer, got $("$python" --version 2>&1); set PYTHON to one" >&2
    exit 2
fi
echo "Installing into $venv; this takes about two minutes, more if torch is downloaded ..."
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint "$constraints" --editable ".[dev]"
# Compile on all cores. pip would use one. Some packages contain files that do not compile on
# purpose.
"$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null || true
echo "$wanted" >"$installed"
