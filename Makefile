# make demo   sets everything up in .venv, runs the main job and writes runs/demo/report/report.html
# make test   sets everything up in .venv, then lints, type-checks and tests
# make docs   builds the pages and the API reference as HTML: build/docs/index.html; a warning is an error
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*/*)
# processes of the tests, one thread each
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

.PHONY: setup demo test lint bench docs clean

setup: $(VENV)/.ready

# torch goes in first and the package is built without isolation: a build environment would download torch again.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel ninja numpy torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m fastnull demo --out runs/demo --overwrite

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python -m fastnull bench

# -E reads every page anew, so that no warning hides behind a cache. Not `python -m sphinx`: that would put this folder
# on the path, where transformers takes kernels/ for a package of that name.
docs: setup
	$(BIN)/sphinx-build -q -E -W --keep-going -b html docs build/docs

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
