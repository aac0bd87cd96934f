"""What can still be checked in a spec with faults: its sound sections, the others replaced by valid ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from xtrain.spec.problems import UNKNOWN, Path, could_mean
from xtrain.spec.tree import Spec

REQUIRED: dict[str, Any] = {
    "model": {"preset": "gpt2-nano"},
    "data": {"source": "synthetic"},
    "batch": {"global": 1},
    "train": {"steps": 1},
    "optimizer": {"lr": 1},
}
"""Stand in for required sections that are not sound; the others have defaults."""


def sound_part(
    data: Mapping[str, Any], faults: Mapping[Path, str], doubtful: Iterable[str]
) -> tuple[Spec, set[str]]:
    """A valid spec with the sound sections of `data`, and the names of those that are not.

    A section is not sound when one of its keys has a fault, is one of `doubtful` (dotted), or is
    probably what an unknown key was meant to be. Other unknown keys are left out.
    """
    unknown = [path for path, kind in faults.items() if kind == UNKNOWN]
    meant = [key for path in unknown for key in could_mean(path, data)]
    unsound = {path[0] for path in faults if path not in unknown}
    unsound |= {key.partition(".")[0] for key in (*meant, *doubtful)}
    sound = {name: section for name, section in data.items() if name not in unsound}
    for path in unknown:
        if path[0] in sound:
            sound = _without(sound, path)
    return Spec.model_validate({**REQUIRED, **sound}), unsound


def _without(section: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A copy of `section` that lacks the key at `path`."""
    key, below = path[0], path[1:]
    rest = {name: value for name, value in section.items() if name != key}
    return {**rest, key: _without(section[key], below)} if below else rest
