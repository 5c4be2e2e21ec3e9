# One verb per task. Each works in a fresh clone with nothing but Python >= 3.11 and make.
#
#   make demo     train a small GPT, kill it in the middle of a save, resume, compare
#   make test     lint, types and every test
#   make unit-fast  the tests of the parts, and of resuming: some minutes, for every day
#   make check    lint and types only
#   make bench    the measurements
#   make gpu      the tests and the benches that need a CUDA device
#   make matrix   the promise's tests with other versions of Python, torch, NumPy, Numba and Zarr
#   make docs     the documentation, into site/
#   make soak     the long tests
#   make powerloss  pull the plug of disks under real file systems; as root, see CONTRIBUTING.md
#   make clean    remove what was built; `make distclean` also removes the environments
#
# PYTHON=python3.12 picks another interpreter, ARGS="..." is handed to what the verb runs.

SHELL      := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := test
.NOTPARALLEL:

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# A second environment proves that storage and the pure modules need no torch, with a newer zarr.
VENV_STORAGE := .venv-storage
STORAGE_TESTS = tests/storage $(wildcard tests/pure)
STORAGE_NEEDS := numpy numba awscrt zarr ml_dtypes obstore tensorstore zarrs hypothesis pytest pytest-cov pytest-randomly pytest-timeout pytest-xdist xarray

# Test files run in JOBS processes; what measures runs afterwards, with nothing beside it.
JOBS ?= 2
SIDE_BY_SIDE = -n $(JOBS) --dist loadfile
EVERYDAY := not soak and not gpu and not powerloss

# What is plain arithmetic and tables has every branch tested.
PURE := gockpt/core/boxes.py,gockpt/core/save_policy.py,gockpt/planning/save_interval.py,gockpt/core/arena_layout.py,gockpt/core/save_state.py,gockpt/core/retention.py,gockpt/planning/planner.py,gockpt/core/array_spec.py

export HYPOTHESIS_PROFILE ?= ci

.PHONY: matrix demo test check lint types unit unit-fast test-storage-newest coverage bench gpu gpu-tests gpu-bench docs soak powerloss format clean distclean

demo: $(VENV)/.installed
	$(BIN)/python bench/demo.py $(ARGS)

test: check test-storage-newest unit

check: lint types

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

unit: $(VENV)/.installed
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "$(EVERYDAY) and not alone" $(ARGS)
	$(BIN)/python -m pytest -m "$(EVERYDAY) and alone" $(ARGS) || test $$? = 5 # 5: ARGS asked for none of them

# Left out: whole runs with faults, killed processes, windows off a device, and what starts many processes.
unit-fast: $(VENV)/.installed
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --ignore=tests/storage/crash --ignore=tests/device/windows \
	  tests/pure tests/state tests/kernels tests/replay tests/engine tests/device tests/storage tests/restore \
	  tests/promise/test_resume.py tests/test_architecture.py tests/test_exports.py $(ARGS)

soak: export HYPOTHESIS_PROFILE := soak
soak: $(VENV)/.installed
	$(BIN)/python -m pytest -m soak $(ARGS)

powerloss: $(VENV)/.installed
	$(BIN)/python $(PIP) mfusepy
	$(BIN)/python -m pytest -m powerloss --log-cli-level=INFO $(ARGS)

# With --large, builds of torch for CUDA are downloaded as well.
matrix:
	$(PYTHON) bench/matrix.py $(ARGS)

coverage: $(VENV)/.installed
	$(BIN)/python -m pytest --cov --cov-report=term $(ARGS)
	$(BIN)/coverage report --fail-under=100 --include='$(PURE)'

bench: $(VENV)/.installed
	for bench in $(filter-out bench/bench_gpu.py,$(wildcard bench/bench_*.py)); do echo "== $$bench"; $(BIN)/python "$$bench" $(ARGS); done

# With PYTHON=... that interpreter as it is, from the sources and without installing anything; else the
# environment. Of the pytest plugins in pyproject.toml, such an interpreter needs none.
ifneq ($(origin PYTHON),file)
GPU_PYTHON := $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
gpu-tests gpu-bench: $(VENV)/.installed
endif
gpu gpu-tests gpu-bench: export PYTHONPATH := $(CURDIR)
gpu: gpu-tests gpu-bench

gpu-tests:
	$(GPU_PYTHON) bench/probe_cuda_replay.py
	$(GPU_PYTHON) -m pytest -c /dev/null --rootdir . --import-mode=importlib -q -ra -m gpu tests/kernels tests/device tests/replay

gpu-bench:
	$(GPU_PYTHON) bench/bench_gpu.py
	$(GPU_PYTHON) bench/bench_train.py --device cuda --worker thread process --params 350000000 \
	  --batch 4 --context 512 --every 10 --steps 40 --rounds 3 $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --config-file .mkdocs.yml

format: $(VENV)/.installed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage .coverage.* htmlcov demo-run
	find gockpt kernels storage tests bench -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV_STORAGE) *.egg-info

# setuptools is installed first and the build uses it, so that its version is pinned as well.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "gockpt needs Python 3.11 or newer, and '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' can't create virtual environments: install its venv module" \
	       "(Debian: python3-venv), or name another interpreter: make PYTHON=..." >&2; exit 1; }
	@echo "== $(VENV): installing what constraints.txt pins, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) setuptools
	$(BIN)/python $(PIP) --no-build-isolation --editable '.[test,check,bench]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python $(PIP) --no-build-isolation --editable '.[docs]'
	touch $@

# The first interpreter that is 3.12 or newer and can create environments; empty when there is none.
define find_newer
for python in python3.12 python3.13 python3.14 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do \
  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info < (3, 15))' 2>/dev/null; \
  then echo "$$python"; break; fi; done
endef

test-storage-newest: $(VENV)/.installed
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then \
	  echo "== $@: left out, $(VENV) is Python 3.12 or newer itself and has the newer zarr"; exit 0; fi; \
	newer="$$($(find_newer))"; \
	if [ -z "$$newer" ]; then \
	  echo "== $@: left out, no Python 3.12 or newer was found beside $$($(BIN)/python --version)"; exit 0; fi; \
	$(MAKE) --no-print-directory $(VENV_STORAGE)/.installed NEWER="$$newer"; \
	echo "== $@: $$($(VENV_STORAGE)/bin/python --version), without torch"; \
	$(VENV_STORAGE)/bin/python -m pytest $(SIDE_BY_SIDE) --ignore=tests/storage/crash $(STORAGE_TESTS) # no business of Python's

$(VENV_STORAGE)/.installed: pyproject.toml constraints.txt Makefile
	@echo "== $(VENV_STORAGE): installing with $(NEWER), once"
	$(NEWER) -m venv $(VENV_STORAGE)
	$(VENV_STORAGE)/bin/python $(PIP) setuptools $(STORAGE_NEEDS)
	$(VENV_STORAGE)/bin/python $(PIP) --no-build-isolation --no-deps --editable .
	touch $@
