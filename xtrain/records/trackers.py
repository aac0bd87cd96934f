"""TensorBoard and wandb: extras that are told every update, and that can never stop a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from xtrain.contract import JSON
from xtrain.errors import RequestError
from xtrain.records.metrics import StepRecord

Say = Callable[[str], None]


class Tracker(Protocol):
    """One place that figures are sent to. Any method may raise anything."""

    name: str

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `directory`/tensorboard; what an earlier process wrote from `first_step` on is void."""

    name = "tensorboard"

    def __init__(self, directory: Path, spec: Mapping[str, JSON], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step, flush_secs=10)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A wandb run with its files in `directory`/wandb; online, offline or off as WANDB_MODE says."""

    name = "wandb"

    def __init__(self, directory: Path, spec: Mapping[str, JSON], first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project="xtrain",
            name=directory.absolute().name,
            dir=directory,
            config=dict(spec),
            settings=wandb.Settings(console="off"),  # our output is ours
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, Callable[[Path, Mapping[str, JSON], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
}


class Trackers:
    """The trackers of a run. One that fails is reported once and switched off."""

    def __init__(self, trackers: Iterable[Tracker], say: Say) -> None:
        self._trackers = list(trackers)
        self._say = say

    def log(self, record: StepRecord) -> None:
        """Send one update's figures to every tracker that still works."""
        if self._trackers:
            figures = figures_of(record)
            for tracker in list(self._trackers):
                self._try(tracker, partial(tracker.log, record.step, figures))

    def close(self) -> None:
        """Return once everything was written, or could not be."""
        for tracker in list(self._trackers):
            self._try(tracker, tracker.close)
        self._trackers.clear()

    def _try(self, tracker: Tracker, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._trackers.remove(tracker)
            self._say(_failed(tracker.name, error))
            with suppress(Exception):
                tracker.close()


def require_installed(names: Sequence[str]) -> None:
    """RequestError for the first tracker whose package is missing; imports none of them."""
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            raise RequestError(
                f"log.trackers: found {name}, which is not installed; "
                f"run: pip install 'xtrain[{name}]', or leave it out"
            ) from None


def open_trackers(
    names: Sequence[str], directory: Path, spec: Mapping[str, JSON], say: Say, first_step: int = 1
) -> Trackers:
    """Start the trackers of a run whose next update is `first_step`; one that cannot start is reported.

    Raises RequestError when one is not installed.
    """
    require_installed(names)
    started: list[Tracker] = []
    for name in dict.fromkeys(names):
        try:
            started.append(TRACKERS[name](directory, spec, first_step))
        except Exception as error:
            say(_failed(name, error))
    return Trackers(started, say)


def figures_of(record: StepRecord) -> dict[str, float]:
    """What of an update is a number and is known: {"loss": ..., "spans/forward": ...}."""
    values: dict[str, Any] = asdict(record)
    del values["step"]
    spans = values.pop("spans") or {}
    values.update({f"spans/{phase}": seconds for phase, seconds in spans.items()})
    return {key: float(value) for key, value in values.items() if value is not None}


def _failed(name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{name} is switched off: {type(error).__name__}{f': {reason}' if reason else ''}; training goes on"
    )
