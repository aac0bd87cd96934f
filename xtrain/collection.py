"""When Python looks for garbage: not while a training run is imported.

Imports of torch and transformers make objects by the hundred thousand, all to stay, and the collector goes
through them again and again. Of 4.2 s of CPU time that importing both took, it was 1.2.
"""

from __future__ import annotations

import gc


def collect_later() -> None:
    """From the start of a process that trains."""
    gc.disable()


def begin_collecting() -> None:
    """Before anything large is made. What there is by now stays, and is not looked at again.

    Does nothing in a process that never put it off: a program that calls xtrain has its own garbage.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
