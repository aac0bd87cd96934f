"""`python -m xtrain.launching.worker MODULE ARGUMENTS`: run MODULE as one worker of a launch.

What a worker owes its launcher: its id, how it ended, and not to outlive it.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

from xtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, XtrainError
from xtrain.launching.supervise import watch_parent
from xtrain.signals import Interrupted

FOLDER = "XTRAIN_LAUNCH_FOLDER"
"""Where workers of one launch leave word; unset when xtrain did not launch them."""


@dataclass(frozen=True)
class Ending:
    """How one worker ended."""

    rank: int
    code: int
    message: str

    @property
    def orderly(self) -> bool:
        return self.code in (EXIT_DONE, EXIT_INTERRUPTED)


def main() -> int:
    """Run the module; the exit code is the one its launcher's agent should see."""
    # Silently, until the run itself takes signals: there is nothing to save yet.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rank = int(os.environ["RANK"])
    register(rank)
    sys.argv = sys.argv[1:]
    code, message = _outcome_of(sys.argv[0])
    leave_word(rank, code, message)
    # To the agent an interrupted worker is a good one: others must not be ended for it.
    return EXIT_DONE if code == EXIT_INTERRUPTED else code


def _outcome_of(module: str) -> tuple[int, str]:
    """Exit code and last words of `python -m MODULE`."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or EXIT_DONE, ""
        return EXIT_FAILED, str(left.code)
    except (XtrainError, Interrupted) as error:
        return error.exit_code, str(error)
    except Exception as error:
        return EXIT_FAILED, _traceback(error)
    return EXIT_DONE, ""


def _traceback(error: Exception) -> str:
    """As Python prints it, less the frames of how the module was started."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        frame = frame.tb_next
    return "".join(traceback.format_exception(error.with_traceback(frame))).rstrip()


def register(rank: int) -> None:
    """Tell the launcher this process's id, and from now on end when the parent does."""
    watch_parent()
    if folder := os.environ.get(FOLDER):
        (Path(folder) / f"{rank}.ending").unlink(missing_ok=True)  # of the one before a restart
        _write(Path(folder) / f"{rank}.pid", str(os.getpid()))


def launched() -> bool:
    """Whether xtrain started this process as one of several workers."""
    return FOLDER in os.environ


def leave_word(rank: int, code: int, message: str) -> None:
    """Tell the launcher how this process ends."""
    _write(Path(os.environ[FOLDER]) / f"{rank}.ending", json.dumps(asdict(Ending(rank, code, message))))


def _write(file: Path, text: str) -> None:
    """Whole or not at all: others look at any time."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def ending(folder: Path, rank: int) -> Ending | None:
    """What the worker said of its end; None when it could not, or lives."""
    file = folder / f"{rank}.ending"
    return Ending(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def said_at(folder: Path, rank: int) -> float:
    """When, in seconds, it said so; infinity when it did not."""
    file = folder / f"{rank}.ending"
    return file.stat().st_mtime if file.exists() else inf


def endings(folder: Path) -> list[Ending]:
    """Of all workers that said something of theirs."""
    found = [ending(folder, int(file.stem)) for file in folder.glob("*.ending") if file.stem.isdigit()]
    return [one for one in found if one is not None]


def process_ids(folder: Path) -> dict[int, int]:
    """Process id by rank, of the workers that came so far as to register."""
    return {int(file.stem): int(file.read_text()) for file in folder.glob("*.pid") if file.stem.isdigit()}


if __name__ == "__main__":
    sys.exit(main())
