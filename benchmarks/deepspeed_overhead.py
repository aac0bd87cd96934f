"""What xtrain costs beside a plain DeepSpeed script: ZeRO 0, 2 and 3, in one run; the bar is 0.98.

    python -m benchmarks.deepspeed_overhead [--rounds N] [--threads N] [--precisions fp32 bf16]

Programs, method (turns in fresh processes, an A/A control, the spread) and page are those of
benchmarks/overhead.py, on the size where a step is long enough for its bar of 0.98.
"""

from __future__ import annotations

import sys

from benchmarks import overhead

ENGINES = ["deepspeed:0", "deepspeed:2", "deepspeed:3"]


def main() -> int:
    return overhead.main("deepspeed_overhead", engines=ENGINES, sizes=["small"])


if __name__ == "__main__":
    sys.exit(main())
