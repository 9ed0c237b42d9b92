#!/usr/bin/env bash
# Make .venv and install the project into it, with the versions of constraints.txt.
# Does nothing if that is done already. PYTHON chooses the interpreter (3.10 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

installed=.venv/installed
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [[ -f $installed && $(<"$installed") == "$wanted" ]]; then
    exit 0
fi
echo "Installing into .venv; this takes about two minutes, more if torch is downloaded ..."
"${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".[dev]"
echo "$wanted" >"$installed"
