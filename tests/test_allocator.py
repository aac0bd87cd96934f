"""Freed memory stays with the process, unless the user set the allocator up."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc's allocator")

FAULTS = """
import resource
from xtrain.allocator import keep_freed_memory
done = {keep} and keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [bytearray(8 << 20) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(int(bool(done)), faults())
"""


def faults(keep: bool, **environ: str) -> tuple[bool, int]:
    code = FAULTS.format(keep=keep)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": "", **environ}
    )
    kept, count = done.stdout.split()
    return kept == "1", int(count)


def test_memory_that_is_taken_again_costs_no_page_faults() -> None:
    kept, with_it = faults(True)
    _, without = faults(False)
    assert kept
    assert with_it < without / 10


def test_the_users_own_settings_are_left_alone() -> None:
    kept, _ = faults(True, MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
