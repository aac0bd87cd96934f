#!/bin/sh
# `make gpu` on a machine without a network. It has Python, torch and numpy; the rest is in .wheels,
# which `make wheels` filled elsewhere. Arguments go to benchmarks/gpu.py.
set -e
cd "$(dirname "$0")/.."
python3 -m venv --system-site-packages .venv-gpu
.venv-gpu/bin/python -m pip install --quiet --no-index --no-deps .wheels/*.whl
.venv-gpu/bin/python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
exec .venv-gpu/bin/python -m benchmarks.gpu "$@"
