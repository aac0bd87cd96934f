"""`xtrain run`, but nothing is saved: of GPT-2 Large each run would leave 9 GB, and wait for the disk.

    python -m benchmarks.gpu_run run SPEC.yaml --backend cuda --out FOLDER

What saving costs is a part of its own in `make gpu`.
"""

from __future__ import annotations

from unittest.mock import patch

from xtrain.checkpoints.manager import Checkpointer
from xtrain.cli import main

if __name__ == "__main__":
    with patch.object(Checkpointer, "save"):
        main()
