# Everything a fresh machine needs: `make demo` and `make test` build their environment first, if it is not there.

PYTHON ?= python3
# A plain `torch` would bring gigabytes of CUDA libraries; set TORCH to the build you want.
TORCH ?= torch==2.13.0
LEGACY_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.8.*/bin/python3.8) $(shell command -v python3.8 2>/dev/null))
BIN := .venv/bin
LEGACY := .venv-legacy/bin

.PHONY: demo test test-legacy check clean

demo: .venv/ready
	$(BIN)/dacal demo $(ARGS)

test: check
	$(BIN)/python -m pytest -q

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# DAFormer's, HRDA's and MIC's own environment: Python 3.8 and torch 1.7.1.
test-legacy: .venv-legacy/ready
	$(LEGACY)/python -m pytest -q

.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-legacy/ready: setup.cfg pyproject.toml
	@test -n "$(LEGACY_PYTHON)" || { echo "test-legacy: expected a Python 3.8, found none; set LEGACY_PYTHON=/path/to/python3.8"; exit 1; }
	$(LEGACY_PYTHON) -m venv .venv-legacy
	$(LEGACY)/python -m pip install --quiet torch==1.7.1
	$(LEGACY)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-legacy build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
