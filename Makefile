# `make` alone: lint, types and the fast tests. `make help` lists the targets.
#
# Every target makes its own .venv when there is none, whichever other environment is active, and
# installs what constraints.txt pins. PYTHON=/path/to/python3.12 makes it with another interpreter.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt
PEERS_PIP := .venv-peers/bin/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt \
    --constraint benchmarks/peers-constraints.txt
# Test processes share the cores: more threads than one each makes them fight.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# `make test` shares the files among so many processes. Each takes up to 2 GiB with what it starts.
WORKERS ?= 2

# What xtrain, DeepSpeed and pytest need beside torch and numpy, which a machine with a GPU has.
OFFLINE := annotated-types click einops hjson iniconfig msgpack ninja packaging pluggy psutil py-cpuinfo pydantic \
    pydantic-core pygments pytest pyyaml safetensors setuptools tabulate tqdm typing-extensions typing-inspection
PLATFORMS := $(foreach n,5 12 17 27 28,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64

.DEFAULT_GOAL := check
.PHONY: check run test proofs lint types bench peers gpu wheels format clean help

check: lint types  ## lint, types and the fast tests
	$(TEST) -m "not slow"

run: $(READY)  ## train configs/quickstart.yaml on the best backend here
	$(BIN)/xtrain run configs/quickstart.yaml --backend auto

test: $(READY)  ## all tests, those that start processes too, by files in WORKERS processes
	$(TEST) --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --junitxml=.tests.xml

proofs: $(READY)  ## docs/proofs.md, from what the last `make test` counted and measured
	$(BIN)/python -m tests.proofs .tests.xml

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy --strict over xtrain, backends, benchmarks and tests
	$(BIN)/mypy

bench: $(READY)  ## what xtrain costs beside hand-written loops (about half an hour)
	$(BIN)/python -m benchmarks.overhead

peers: .venv-peers/.ready  ## xtrain beside Accelerate, Trainer, Lightning, DeepSpeed (about an hour)
	.venv-peers/bin/python -m benchmarks.peers --precisions fp32 bf16 --rounds 3 --memory
	.venv-peers/bin/python -m benchmarks.peers --large-vocabulary --no-speed --memory

gpu: $(READY)  ## what there is to prove and to measure on one NVIDIA GPU, within ten minutes
	$(BIN)/python -m benchmarks.gpu

wheels: $(READY)  ## .wheels: what benchmarks/gpu_offline.sh installs where there is no network
	$(BIN)/python -m pip download --quiet --no-deps --constraint constraints.txt --dest .wheels \
	    --only-binary=:all: --python-version 3.12 --implementation cp $(PLATFORMS) $(OFFLINE)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --constraint constraints.txt \
	    --wheel-dir .wheels deepspeed

format: $(READY)  ## rewrite in place what `make lint` would complain about
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and everything that was built; runs are kept
	rm -rf .venv .venv-peers .venv-gpu .wheels build dist *.egg-info .tests.xml .pytest_cache .mypy_cache .ruff_cache .hypothesis
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

.venv-peers/.ready: pyproject.toml constraints.txt benchmarks/peers-constraints.txt
	@$(PYTHON) -m venv .venv-peers
	@$(PEERS_PIP) setuptools wheel
	@$(PEERS_PIP) torch numpy
	@$(PEERS_PIP) --editable '.[hf]' accelerate lightning
	@touch $@
