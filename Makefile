# Every target sets itself up in .venv; all it needs is python3 (>= 3.11) with venv and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHON
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo docs test test-slow test-ray test-lmms-eval test-explore lint format wheel smoke smoke-open parity compat clean

demo: $(VENV)/.runtime  ## The main job on the embedded model: a table, pictures and a report in evengaze-demo/
	$(BIN)/evengaze demo --out evengaze-demo $(ARGS)

test: $(VENV)/.dev  ## All tests but the slow ones
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev  ## Compilation, interrupts at every point, threads at every stage: minutes each
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

# Each in an environment of its own: their dependencies (lmms-eval's filelock and av) do not suit the rest.
ENVS ?= .venv-
test-ray: $(ENVS)ray/.ready  ## Evaluation and server on Ray: equal answers, lost nodes, workers and replicas
	$(ENVS)ray/bin/python -m pytest tests/evaluate/test_ray.py tests/serve/test_front.py tests/serve/test_ray.py $(ARGS)

test-lmms-eval: $(ENVS)lmms-eval/.ready  ## The plug-in inside lmms-eval
	$(ENVS)lmms-eval/bin/python -m pytest tests/evaluate/test_lmms_eval.py $(ARGS)

test-explore: $(ENVS)explore/.ready  ## The explorer's page in Chromium (Debian's package chromium)
	GRADIO_ANALYTICS_ENABLED=False $(ENVS)explore/bin/python -m pytest tests/explore $(ARGS)

docs: $(ENVS)docs/.ready  ## The site in build/site: warnings are errors, its code is run or checked
	$(ENVS)docs/bin/python -m pytest tests/docs $(ARGS)
	NO_MKDOCS_2_WARNING=1 $(ENVS)docs/bin/mkdocs build

$(ENVS)explore/.ready: pyproject.toml constraints.txt  # Gradio does not take the newest Pillow
	$(PYTHON) -m venv $(ENVS)explore
	grep -v '^pillow' constraints.txt > $(ENVS)explore/constraints.txt
	$(ENVS)explore/bin/python -m pip install -q --disable-pip-version-check -c $(ENVS)explore/constraints.txt \
		-e ".[explore,cli]" pytest playwright
	touch $@

EXTRAS_ray := ray,judge
$(ENVS)%/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENVS)$*
	$(ENVS)$*/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(or $(EXTRAS_$*),$*)]" pytest psutil
	touch $@

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

smoke: wheel  ## The wheel in an empty environment, outside the repository, with the versions of constraints.txt
	tools/smoke.sh build/smoke -c constraints.txt

smoke-open: wheel  ## The same with whatever the registry serves today (TORCH=torch==... puts a build of torch there first)
	tools/smoke.sh build/smoke-open

RELEASES ?= newest 5.23 5.21
compat: $(RELEASES:%=compat-%)  ## Engine, models, methods, parity, debiasing and family matrix on releases of transformers

compat-%:
	tools/compat.sh $*

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e ".[cli]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.runtime

clean:
	rm -rf build dist .compat .mypy_cache .pytest_cache .ruff_cache .hypothesis evengaze-demo
