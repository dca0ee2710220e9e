# make demo    what prunectl does, on the models in fixtures/ (installs all extras into .venv first)
# make test    every test (installs all extras into .venv first)
# make check   what CI checks: lint, format, types, architecture, tests
# make bench   speed and memory beside the scripts that it replaces
# make house   how the code is cut: files, lines, names, what a command runs through
# make man     the manual page, prunectl.1

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
JOBS ?= 2

.PHONY: demo test check lint bench house fixtures man clean

demo: .venv/.full
	@BIN=$(BIN) sh examples/demo.sh

test: .venv/.full
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

check: lint test

lint: .venv/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.full
	$(PIP) install -c constraints.txt --group bench
	$(BIN)/python -m benchmarks

house: .venv/.full
	$(BIN)/python -m benchmarks.house

man: .venv/.core
	$(BIN)/prunectl help --man > prunectl.1

fixtures: .venv/.full
	$(BIN)/python fixtures/make.py

.venv/.pip:
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade 'pip>=25.1'
	@touch $@

.venv/.core: .venv/.pip pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/.full: .venv/.pip pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt --group dev -e '.[all]'
	@touch $@ .venv/.core

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
