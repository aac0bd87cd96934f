#!/bin/sh
# `make gpu` on a machine without a network. It has Python, torch and numpy; the rest is in .wheels,
# which `make wheels` filled elsewhere. Arguments go to benchmarks/gpu.py.
#
# PYTHON=/path/to/python3.12 takes another interpreter. That one's torch is found wherever it lies, also in a
# virtual environment; pip need not be in the new one, nor ensurepip on the machine.
set -e
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
INSTALL="$PYTHON -m pip --python .venv-gpu/bin/python install --quiet --no-index --no-deps"
"$PYTHON" -m venv --without-pip --system-site-packages .venv-gpu
"$PYTHON" -c 'from importlib.util import find_spec; from pathlib import Path
print(*{Path(find_spec(name).origin).parents[1] for name in ("numpy", "torch")}, sep="\n")' \
    > "$(echo .venv-gpu/lib/python3.*/site-packages)/torch.pth"
$INSTALL .wheels/*.whl
$INSTALL --no-build-isolation --editable .
exec .venv-gpu/bin/python -m benchmarks.gpu "$@"
