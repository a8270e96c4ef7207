# Everything a fresh machine needs: `make demo` and `make test` build their environment first, if it is not there.

PYTHON ?= python3
# A plain `torch` would bring gigabytes of CUDA libraries; set TORCH to the build you want.
TORCH ?= torch==2.13.0
# Test processes, of one thread each: those of several threads wait for each other by spinning, and slow each other down.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
LEGACY_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.8.*/bin/python3.8) $(shell command -v python3.8 2>/dev/null))
BIN := .venv/bin
LEGACY := .venv-legacy/bin

# `make test` leaves out what is marked slow, `make test-all` nothing.
.PHONY: demo test test-all test-legacy check docs upstream upstream-mmengine clean

demo: .venv/ready
	$(BIN)/dacal demo $(ARGS)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(WORKERS) -m "not slow"

test-all: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(WORKERS)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages, into docs/_build/html: a warning is an error.
docs: .venv/ready
	$(BIN)/python -m sphinx -q -W --keep-going -n -d docs/_build/doctrees docs docs/_build/html

# DAFormer's, HRDA's and MIC's own environment: Python 3.8 and torch 1.7.1.
test-legacy: .venv-legacy/ready
	OMP_NUM_THREADS=1 $(LEGACY)/python -m pytest -q --numprocesses $(WORKERS)

# The integration in the real trainers: make upstream DAFORMER=path HRDA=path MIC=path, each where there is one. Their environment
# is built unless HOST_PYTHON names the interpreter of another, for example of the official one (examples/mmseg/README.md).
HOST_PYTHON ?= .venv-hosts/bin/python
upstream: .venv/ready $(if $(filter .venv-hosts/%,$(HOST_PYTHON)),.venv-hosts/ready)
	DACAL_DAFORMER="$(DAFORMER)" DACAL_HRDA="$(HRDA)" DACAL_MIC="$(MIC)" DACAL_HOST_PYTHON="$(abspath $(HOST_PYTHON))" \
		$(BIN)/python -m pytest -q -rs tests/test_upstream.py

# The integration in the real MMSegmentation 1.x, whose environment is built.
upstream-mmengine: .venv-mmengine/ready
	OMP_NUM_THREADS=1 .venv-mmengine/bin/python -m pytest -q -rs -p no:cacheprovider tests/test_mmengine.py tests/test_weighted_heads.py

# mmcv without its compiled operations, on a CPU.
.venv-mmengine/ready: examples/mmengine/requirements.txt
	$(PYTHON) -m venv .venv-mmengine
	.venv-mmengine/bin/python -m pip install --quiet $(TORCH)
	.venv-mmengine/bin/python -m pip install --quiet --requirement examples/mmengine/requirements.txt
	.venv-mmengine/bin/python -m pip install --quiet --editable '.[evaluate]' pytest pytest-xdist hypothesis
	touch $@

# mmcv 1.3.7 in pure Python, and a torch of today, on a CPU.
.venv-hosts/ready:
	$(PYTHON) -m venv .venv-hosts
	.venv-hosts/bin/python -m pip install --quiet $(TORCH)
	.venv-hosts/bin/python -m pip install --quiet --no-deps timm==0.3.2 kornia==0.7.4 kornia_rs==0.1.9 higher==0.2.1
	.venv-hosts/bin/python -m pip install --quiet --requirement examples/mmseg/requirements.txt
	.venv-hosts/bin/python -m pip install --quiet --no-deps --no-build-isolation mmcv==1.3.7
	touch $@

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
	rm -rf .venv .venv-legacy .venv-hosts .venv-mmengine docs/_build build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
