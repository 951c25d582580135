#!/usr/bin/env bash
# smoke.sh FOLDER [pip options]: install the wheel into an empty environment in FOLDER and prune there; then its command
# line, and run the demo.
# TORCH, if set, is what pip installs first (a CPU build, say): the wheel then finds its torch there.
set -euo pipefail
folder=$1
shift
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
if [ -n "${TORCH:-}" ]; then "${pip[@]}" install -q "$TORCH"; fi
"${pip[@]}" install -q "$@" dist/*.whl
"${pip[@]}" list 2>/dev/null | grep -iE "^(evengaze|torch|transformers|tokenizers|huggingface.hub) "
"$folder/bin/python" examples/bare_decoder.py
if "$folder/bin/evengaze" --help; then exit 1; fi # says what to install, as its packages are not there yet
"${pip[@]}" install -q "$@" "$(ls dist/*.whl)[cli]"
cd "$folder"
bin/evengaze demo --limit 40 --out report
test -s report/report.html
