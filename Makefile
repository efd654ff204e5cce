# make run         train, attack and judge tasks.yaml, print its tables; TABLE=3: that table alone
# make test        run the whole test suite
# make check       lint, types, layers of imports, spelling, forms and workflows of .github
# make docs        build the documentation into build/site, and fail at a broken link
# make serve       show the documentation while it is written
# make release     build sdist and wheel into dist/, and try the wheel in an empty environment
# make benchmarks  measure speed as ratios inside one run
# make ratios      compare some of them with tests/benchmarks/ratios.json; RECORD=--record: write what is found there
# make mutants     plant small faults, list those that no test notices; MODULE=bench.losses: in that module alone
# make schema      write docs/suite.schema.json, for editors

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The tools of documentation and release want newer libraries than torchattacks allows: they live apart.
TOOLS ?= .venv-tools
# Options of pip for the empty environment of `make release`, such as another index.
PIP_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: run test check docs serve release benchmarks ratios mutants schema clean
.DEFAULT_GOAL := run

run: $(VENV)/installed
	$(BIN)/bench run tasks.yaml $(if $(TABLE),--table $(TABLE))

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

SCHEMA := $(BIN)/check-jsonschema --builtin-schema

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	$(SCHEMA) vendor.github-actions .github/actions/*/action.yml
	$(SCHEMA) vendor.github-workflows examples/ci/.github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout examples/ci/.github/workflows/*.yml
	$(SCHEMA) vendor.gitlab-ci examples/ci/.gitlab-ci.yml

docs: $(VENV)/installed-dev $(TOOLS)/installed schema
	BENCH=$(BIN)/bench $(TOOLS)/bin/mkdocs build --strict

serve: $(VENV)/installed-dev $(TOOLS)/installed schema
	BENCH=$(BIN)/bench $(TOOLS)/bin/mkdocs serve

release: $(TOOLS)/installed schema
	rm -rf dist build/lib build/bdist.*
	$(TOOLS)/bin/python -m build
	$(TOOLS)/bin/twine check --strict dist/*
	PYTHON=$(PYTHON) PIP_ARGS="$(PIP_ARGS)" .ci/try-wheel dist/*.whl
	cp docs/suite.schema.json dist/

benchmarks: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

# Three minutes, so that a change can be stopped by it.
ratios: $(VENV)/installed-dev
	mkdir -p build
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only -q --benchmark-json=build/ratios.json \
		-k "break_early or test_pgd_costs or test_spsa_costs or test_searches_by_scores"
	$(BIN)/python tests/benchmarks/ratios.py build/ratios.json $(RECORD)

# Judged in docs/mutants.md. What was found lies in mutants/; only what changed since is tried again.
mutants: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/mutmut run $(if $(MODULE),"$(MODULE)*")
	$(BIN)/mutmut results

schema: $(VENV)/installed-dev
	$(BIN)/bench schema --out docs/suite.schema.json

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[libraries]"
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/installed

$(TOOLS)/installed: pyproject.toml
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(TOOLS)/bin/python -m pip install --quiet --group tools
	touch $@

clean:
	rm -rf $(VENV) $(TOOLS) build dist mutants *.egg-info
