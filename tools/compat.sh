#!/usr/bin/env bash
# compat.sh RELEASE: the tests that depend on transformers, on a release of it ("5.23"), or on the "newest" of everything.
# Each release has an environment of its own in .compat/; TORCH says which torch (5.21 gets the oldest that is admitted).
set -euo pipefail
release=$1
folder=.compat/$release
python=$folder/bin/python
pinned=(-c .compat/constraints.txt "transformers==$release.*")
case $release in
newest) pinned=(transformers) torch=${TORCH:-torch} ;;
5.21) torch=${TORCH:-torch==2.6.0} ;;
*) torch=${TORCH:-torch==2.13.0} ;;
esac
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$folder"
grep -vE "^(torch|transformers|tokenizers|huggingface_hub)==" constraints.txt >.compat/constraints.txt
"$python" -m pip install -q --disable-pip-version-check "$torch" "${pinned[@]}" -e ".[dev]"
"$python" -m pip list 2>/dev/null | grep -iE "^(torch|transformers) "
"$python" -m pytest -n 2 -q tests/engine tests/models tests/methods tests/parity tests/debias tests/calibration
"$python" -m evengaze.testing.matrix
