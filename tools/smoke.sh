#!/usr/bin/env bash
# smoke.sh FOLDER [pip options]: install the wheel into an empty environment in FOLDER and prune there; then its command
# line, and run the demo.
# TORCH, if set, is what pip installs first (a CPU build, say): the wheel then finds its torch there.
set -euo pipefail
export COLUMNS=200
folder=$1
shift
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
if [ -n "${TORCH:-}" ]; then "${pip[@]}" install -q "$TORCH"; fi
"${pip[@]}" install -q "$@" dist/*.whl
"${pip[@]}" list 2>/dev/null | grep -iE "^(evengaze|torch|transformers|tokenizers|huggingface.hub) "
"$folder/bin/python" examples/bare_decoder.py
# The demo's packages are not there yet, and it says which extra brings them.
("$folder/bin/evengaze" demo || true) 2>&1 | tee /dev/stderr | grep -qF 'pip install "evengaze[cli]"'
"${pip[@]}" install -q "$@" "$(ls dist/*.whl)[cli]"
cd "$folder"
bin/evengaze demo --limit 40 --out report
test -s report/report.html
