# `make demo` shows what this is for; `make test` runs the tests. Both set up what they need.
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# Hydra 1.3 does not start on Python 3.14.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; \
	then echo $$p; break; fi; done)

# Tests that run at once. Each file is one process's, so that what its tests share is made once.
JOBS ?= 2
# Tests that mostly wait, for servers and for SLURM, of which each process starts a cluster.
WAITING_JOBS ?= 3
# Interpreters that test-pythons uses, each with a virtual environment of its own.
PYTHONS ?= python3.11 python3.12 python3.13

.PHONY: help install demo test test-slow test-slurm test-mutants test-pythons check format docs \
	bench wheel clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

install: $(VENV)/installed  ## make the virtual environment and install into it

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; name it: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## width transfer, whole, on real digits: 5 minutes or less on 2 cores
	$(BIN)/widthopt experiment=demo hydra/launcher=local

test: install  ## the default tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu and not slurm and not mutant"

test-slow: install  ## the tests that take longer
	$(BIN)/python -m pytest -n $(WAITING_JOBS) --dist loadfile -m "slow and not gpu and not slurm"

test-slurm: install  ## the tests on a real SLURM, which is installed if need be (Debian, as root)
	bash tests/slurm/packages.sh
	$(BIN)/python -m pytest -n $(WAITING_JOBS) --dist worksteal -m slurm tests/slurm

test-mutants: install  ## puts known faults into the code and sees a test fail for each
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m mutant tests/mutants

test-pythons:  ## the default tests on each interpreter in PYTHONS
	@set -e; for python in $(PYTHONS); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') || { \
		echo "PYTHONS is $(PYTHONS), but $$python does not start; see CONTRIBUTING.md" >&2; exit 1; }; \
		$(MAKE) VENV=.venv-$$version PYTHON=$$python test; done

check: install  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/docs-installed  ## build the documentation into build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs

bench: install  ## all benchmarks, each a small table
	@for script in benchmarks/[a-z]*.py; do \
		[ $$script = benchmarks/harness.py ] || $(BIN)/python $$script || exit 1; done

wheel: install  ## build the wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

clean:  ## remove what `make` made, but no runs
	rm -rf $(VENV) .venv-* build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
