#!/usr/bin/env bash
# Make .venv and install the project into it, with the versions of constraints.txt.
# Does nothing if that is done already. PYTHON chooses the interpreter (3.10 or newer), VENV and
# CONSTRAINTS another place and other versions.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-constraints.txt}
installed=$venv/installed
wanted=$(cat pyproject.toml "$constraints" | cksum)
if [[ -f $installed && $(<"$installed") == "$wanted" ]]; then
    exit 0
fi
echo "Installing into $venv; this takes about two minutes, more if torch is downloaded ..."
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint "$constraints" --editable ".[dev]"
# On all cores, which pip does on one. Files that do not compile are examples of such.
"$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null || true
echo "$wanted" >"$installed"
