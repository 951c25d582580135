# Every target sets itself up in .venv; all it needs is python3 (>= 3.10) with venv and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint format wheel smoke parity clean

demo: $(VENV)/.runtime  ## The main job on the embedded model: a table, pictures and a report in evengaze-demo/
	$(BIN)/evengaze demo --out evengaze-demo $(ARGS)

test: $(VENV)/.dev  ## All tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.dev  ## Formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

parity: $(VENV)/.dev  ## Every method against recorded results of the official code
	$(BIN)/python tests/parity/run.py --data tests/parity/data/set_a
	$(BIN)/python tests/parity/run.py --data tests/parity/data/set_b

wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --wheel

smoke: wheel  ## The wheel in an empty environment, outside the repository
	rm -rf build/smoke && $(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/smoke && bin/evengaze demo --limit 40 --out report && test -s report/report.html

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.runtime

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis evengaze-demo
