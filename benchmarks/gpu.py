"""`make gpu`: the conformance suite on an NVIDIA GPU, lane by lane.

Where there is none it says so and ends well: nothing was tested, nothing failed.
"""

from __future__ import annotations

import os
import subprocess
import sys

LANES = ("cpu", "cuda", "deepspeed")


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        reason = "no NVIDIA GPU found" if torch.version.cuda else "this torch is built without CUDA"
        print(f"make gpu: {reason}; nothing was tested. Run it on a machine with an NVIDIA GPU.")
        return 0
    print(f"make gpu: {torch.cuda.get_device_name()}, lanes {', '.join(LANES)}", flush=True)
    environment = {**os.environ, "XTRAIN_LANES": ",".join(LANES)}
    return subprocess.run([sys.executable, "-m", "pytest", "tests/conformance"], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
