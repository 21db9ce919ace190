# Each target makes its own .venv from constraints.txt and uses it again while it is up to date.
#   make test PYTHON=python3.12      with another interpreter (once: it is the one that makes .venv)

PYTHON ?= python3
VENV := .venv
NEEDED_GIB ?= 8
SANITIZE_PYTHON ?= python3.12
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/* build_backend/*.py) aligntok/_cuda_toolkit.py
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
DOCUMENTABLE := $(VENV)/.documentable
SANITIZER := .venv-sanitize
SANITIZABLE := $(SANITIZER)/.sanitizable

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint docs drill kernel-report sanitize matrix gpu-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

install: $(INSTALLED)  ## .venv with aligntok in editable mode, its C++ extension compiled

quickstart: $(INSTALLED)  ## install, then train a small tokenizer and generator and write runs/quickstart/report.html
	$(BIN)/aligntok quickstart

test: $(TESTABLE)  ## install with the development tools, then run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(TESTABLE)  ## ruff: rules and formatting; mypy: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCUMENTABLE)  ## the site, warnings as errors: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

drill: $(INSTALLED)  ## kill, cut off, flip, fill up, stall: 13 kinds of faults, after which nothing may be lost
	$(BIN)/python -m benchmarks.drill

kernel-report: $(TESTABLE)  ## compile every kernel for six architectures, read the machine code, count bytes: benchmarks/results/
	$(BIN)/python -m benchmarks.hardware_report

sanitize: $(SANITIZABLE)  ## execute what Triton compiles of the kernels, without a GPU: out of bounds, races; needs Python 3.12 or 3.13
	OMP_NUM_THREADS=1 $(SANITIZER)/bin/python -m benchmarks.sanitize

matrix: $(TESTABLE)  ## the kernels with four pairs of PyTorch and Triton, each in an environment of its own (6 GB, removed again)
	$(BIN)/python -m benchmarks.version_matrix

gpu-check: $(TESTABLE)  ## on a machine with a GPU: its tests, all benchmarks, training throughput, in eight minutes
	$(BIN)/python -m benchmarks.gpu_check

clean:  ## remove .venv, build results and caches; runs/ stays
	rm -rf $(VENV) $(SANITIZER) build dist site *.egg-info aligntok/_C.* .matrix .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "aligntok needs Python 3.10 or newer, '$(PYTHON)' is not; choose one with: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); [ "$$free" -ge $(NEEDED_GIB) ] || \
	  { echo "$$free GiB are free here, $(VENV) takes up to $(NEEDED_GIB) (most of it PyTorch for CUDA): make room on this disk,"; \
	    echo "or say that less will do, as for a PyTorch without CUDA: make NEEDED_GIB=2"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: the extension is compiled against the release that constraints.txt names, and torch is unpacked only once.
$(INSTALLED): $(SOURCES) | $(BIN)/python
	$(PIP) install -c constraints.txt torch torchvision setuptools ninja
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	@$(BIN)/python -W ignore -c 'from aligntok.kernels import _extension as e; print(e.unavailable() or "aligntok._C: built and loaded")'
	@touch $@

# aligntok itself is there already, so this adds the tools of the extra without compiling again.
$(TESTABLE): $(INSTALLED)
	$(PIP) install -c constraints.txt 'aligntok[dev]'
	@touch $@

$(DOCUMENTABLE): $(INSTALLED)
	$(PIP) install -c constraints.txt 'aligntok[docs]'
	@touch $@

# ttsem, which executes compiled kernels, is for Python 3.12 and 3.13 alone. What the kernel tests and steps need, no more.
$(SANITIZABLE): $(SOURCES)
	@$(SANITIZE_PYTHON) -c 'import sys, venv; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	  { echo "not run: '$(SANITIZE_PYTHON)' is no Python 3.12 or 3.13; choose one with: make sanitize SANITIZE_PYTHON=python3.13"; exit 1; }
	$(SANITIZE_PYTHON) -m venv $(SANITIZER)
	$(SANITIZER)/bin/python -m pip --disable-pip-version-check install -c constraints.txt torch torchvision setuptools ninja
	$(SANITIZER)/bin/python -m pip --disable-pip-version-check install -c constraints.txt --no-build-isolation -e .
	$(SANITIZER)/bin/python -m pip --disable-pip-version-check install -c constraints.txt hypothesis pytest scipy transformers ttsem==0.1.0
	@touch $@
