"""`make gpu`: the conformance suite on an NVIDIA GPU.

The suite takes every lane that is usable on the machine. Where there is no GPU this says so and ends
well: nothing was tested, nothing failed. Where there is one, a lane that is missing is a failure.
"""

from __future__ import annotations

import subprocess
import sys

from xtrain import registry

LANES = ("cpu", "cuda", "deepspeed")


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        reason = "no NVIDIA GPU found" if torch.version.cuda else "this torch is built without CUDA"
        print(f"make gpu: {reason}; nothing was tested. Run it on a machine with an NVIDIA GPU.")
        return 0
    found = registry.survey()
    missing = [f"{lane} ({found[lane].reason})" for lane in LANES if not found[lane].usable]
    if missing:
        print(
            f"make gpu: {torch.cuda.get_device_name()}, but not usable: {', '.join(missing)}", file=sys.stderr
        )
        return 1
    print(f"make gpu: {torch.cuda.get_device_name()}, lanes {', '.join(LANES)}", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", "tests/conformance"]).returncode


if __name__ == "__main__":
    sys.exit(main())
