"""What a process owes the launcher that started it: its id, how it ended, and not to outlive it."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "XTRAIN_LAUNCH_FOLDER"
"""Where workers of one launch leave word; unset when xtrain did not launch them."""
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Ending:
    """How one worker ended."""

    rank: int
    code: int
    message: str


def register(rank: int) -> None:
    """Tell the launcher this process's id, and from now on end when the parent does."""
    watch_parent()
    if folder := os.environ.get(FOLDER):
        (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))


def launched() -> bool:
    return FOLDER in os.environ


def leave_word(rank: int, code: int, message: str) -> None:
    """Tell the launcher how this process ends."""
    folder = Path(os.environ[FOLDER])
    partial = folder / f".{rank}"
    partial.write_text(json.dumps(asdict(Ending(rank, code, message))))
    partial.replace(folder / f"{rank}.ending")


def endings(folder: Path) -> list[Ending]:
    """What the workers said, by rank."""
    said = [Ending(**json.loads(file.read_text())) for file in folder.glob("*.ending")]
    return sorted(said, key=lambda ending: ending.rank)


def process_ids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.glob("*.pid") if file.read_text().isdigit()]


def watch_parent() -> None:
    """End this process, wherever it is, when its parent ends: a killed launcher leaves nobody behind."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=look, name="watch-parent", daemon=True).start()
