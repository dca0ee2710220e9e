# make demo    what prunectl does, on a small ONNX model: 230 MB in .venv, the outputs in demo/
# make test    every test (installs every framework into .venv first: 4.3 GB with PyTorch for CPUs)
# make check   what CI checks: lint, format, types, architecture, tests
# make hf      folders of fourteen families through Hugging Face's own libraries, which it installs (200 MB)
# make bench   speed and memory beside the scripts that it replaces
# make house   how the code is cut: files, lines, names, what a command runs through
# make docs    the documentation as a site, in site/; a broken link fails
# make pictures  the terminal in the README, from what is really printed
# make man     the manual page, prunectl.1
# make requirements  the files with hashes, anew, when constraints.txt has changed
# make dist    wheel and source archive, built twice to see that they are the same bytes

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# Without bytecode: to compile all of every framework takes longer than all else, and Python does it for what is used.
INSTALL := $(PIP) install --no-compile
JOBS ?= 2
COMPILE := $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate -c constraints.txt

.PHONY: demo test check lint hf bench house docs pictures requirements fixtures man dist clean

# The date in what is built: that of the commit, so that who builds it again gets the same bytes.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2> /dev/null || echo 1580601600)

demo: .venv/.demo
	@BIN=$(BIN) sh examples/demo.sh

test: .venv/.full
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

check: lint test

lint: .venv/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/zizmor --offline --quiet .github action.yml examples/github-workflow.yml
	@if command -v actionlint > /dev/null; then actionlint; else echo "actionlint is not installed: skipped"; fi

hf: .venv/.full
	$(PIP) install --group hf
	$(BIN)/python -m pytest -q tests/formats/test_transformers.py tests/calibration/test_folders.py

bench: .venv/.full
	$(PIP) install -c constraints.txt --group bench
	$(BIN)/python -m benchmarks

house: .venv/.full
	$(BIN)/python -m benchmarks.house

docs: .venv/.docs
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

pictures: .venv/.demo
	$(BIN)/python -m benchmarks.pictures

man: .venv/.core
	$(BIN)/prunectl help --man > prunectl.1

dist: .venv/.pip
	$(PIP) install --require-hashes -r requirements/build.txt
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist 2> /dev/null
	$(BIN)/python -m hatchling build -d dist/again 2> /dev/null
	@cd dist && for file in again/*; do cmp "$$file" "$${file#again/}" || exit 1; done && rm -r again
	@$(BIN)/pip hash dist/*

requirements: .venv/.pip
	$(PIP) install 'uv>=0.8'
	$(COMPILE) --python-version 3.11 requirements/build.in -o requirements/build.txt
	$(COMPILE) --python-version 3.11 pyproject.toml -o requirements/core.txt
	$(COMPILE) --python-version 3.11.5 --group docs pyproject.toml -o requirements/docs.txt

fixtures: .venv/.full
	$(BIN)/python fixtures/make.py

.venv/.pip:
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade 'pip>=25.1'
	@touch $@

.venv/.core: .venv/.pip pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e .
	@touch $@

.venv/.demo: .venv/.pip pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e '.[onnx]'
	@touch $@ .venv/.core

.venv/.docs: .venv/.pip requirements/docs.txt
	$(INSTALL) --require-hashes -r requirements/docs.txt
	@touch $@

.venv/.full: .venv/.pip pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt --group dev -e '.[all]'
	@touch $@ .venv/.core .venv/.demo

clean:
	rm -rf .venv demo dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
