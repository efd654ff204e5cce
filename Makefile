# make run         train, attack and judge tasks.yaml, print its tables
# make test        run the whole test suite
# make check       lint, types, layers of imports, spelling
# make benchmarks  measure speed as ratios inside one run
# make schema      write docs/suite.schema.json, for editors

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test check benchmarks schema clean
.DEFAULT_GOAL := run

run: $(VENV)/installed
	$(BIN)/bench run tasks.yaml

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

benchmarks: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

schema: $(VENV)/installed-dev
	$(BIN)/bench schema --out docs/suite.schema.json

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build *.egg-info
