# `make` alone: lint, types and the fast tests. `make help` lists the targets.
#
# Every target makes its own .venv when there is none, whichever other environment is active, and
# installs what constraints.txt pins. PYTHON=/path/to/python3.12 makes it with another interpreter.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt
# Test processes share the cores: more threads than one each makes them fight.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# `make test` shares the files among so many processes. Each takes up to 2 GiB with what it starts.
WORKERS ?= 2

.DEFAULT_GOAL := check
.PHONY: check run test lint types bench gpu format clean help

check: lint types  ## lint, types and the fast tests
	$(TEST) -m "not slow"

run: $(READY)  ## train configs/quickstart.yaml on the best backend here
	$(BIN)/xtrain run configs/quickstart.yaml --backend auto

test: $(READY)  ## all tests, those that start processes too, by files in WORKERS processes
	$(TEST) --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy --strict over xtrain, backends, benchmarks and tests
	$(BIN)/mypy

bench: $(READY)  ## what xtrain costs beside hand-written loops (about half an hour)
	$(BIN)/python -m benchmarks.overhead

gpu: $(READY)  ## conformance on an NVIDIA GPU; a clear line where there is none
	$(BIN)/python -m benchmarks.gpu

format: $(READY)  ## rewrite in place what `make lint` would complain about
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and everything that was built; runs are kept
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## /\1	/p' $(MAKEFILE_LIST)

# torch comes first and by its pin, so that nothing after it resolves another one. The stamp is
# written last: an installation that was broken off is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: $(PYTHON) is Python %d.%d, xtrain needs 3.11 or newer; try make PYTHON=python3.12" % v[:2])'
	@echo "installing into .venv (torch is large: minutes on a slow line)" >&2
	@$(PYTHON) -m venv .venv
	@$(PIP) setuptools wheel
	@$(PIP) torch numpy
	@$(PIP) --editable '.[dev]'
	@touch $@
