"""What makes lanes unlike: what a reader must know before believing a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from xtrain.records.summary import clean
from xtrain.report.comparison import Figures
from xtrain.resume import MAY_CHANGE, differences
from xtrain.spec.keys import covering, printed

Lanes = Sequence[tuple[str, Figures]]
T = TypeVar("T")

LONGEST_VALUE = 60
MOST_KEYS = 40
MOST_CHANGES = 4
SAID_ELSEWHERE = ("precision", "data.path")
MACHINE = ("cpu", "platform", "memory_bytes")


def warnings(lanes: Lanes) -> list[str]:
    """A sentence each, the gravest first; empty when the lanes are alike."""
    found = [
        _unlike(lanes, "data_hash", "the lanes saw different data: their losses cannot be compared"),
        _unlike(lanes, "parameters", "the lanes trained different models"),
        *_other_training(lanes),
        _unlike(lanes, "precision", "precision differs: losses agree only roughly"),
        _unlike(
            [(name, figures) for name, figures in lanes if figures.rung is not None],
            "rung",
            "memory: auto chose unlike techniques, repeats of one lane with them are lanes of their own, and "
            "speed and memory compare these too",
        ),
        _unlike(lanes, "threads", "threads per process differ, and with them the speed"),
        _unlike(lanes, "matmul_precision", "the precision of fp32 matrix products differs"),
        _unlike(lanes, "skipped", "the lanes skipped different numbers of steps"),
        _other_machines(lanes),
        _other_versions(lanes),
    ]
    unmatched = {name: figures.unmatched_steps for name, figures in lanes if figures.unmatched_steps}
    found += [
        f"{', '.join(names)}: {count} steps lack a finite loss here or in the reference"
        for count, names in _grouped(unmatched).items()
    ]
    if any(has_dropout(figures) for _, figures in lanes):
        found.append("dropout is on: the losses of unlike engines agree only statistically")
    return [warning for warning in found if warning is not None]


def has_dropout(figures: Figures) -> bool:
    model = figures.spec.get("model")
    return isinstance(model, dict) and bool(model.get("dropout"))


def chosen_differences(lanes: Lanes) -> dict[str, list[str]]:
    """Keys that were meant to differ, techniques and precision, with every lane's value as text."""
    keys = sorted(
        {
            key
            for _, figures in lanes[1:]
            for key, _, _ in differences(lanes[0][1].spec, figures.spec)
            if covering(key, MAY_CHANGE) or covering(key, ("precision",))
        }
    )
    return {
        shown(key): [shown(_value(figures.spec, key)) for _, figures in lanes] for key in keys[:MOST_KEYS]
    }


def shown(value: Any) -> str:
    """A value from a record, short and on one line."""
    text = clean(printed(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _other_training(lanes: Lanes) -> list[str]:
    """Where specs differ from the first lane's in what is learned."""
    found = {name: _changes(lanes[0][1], figures) for name, figures in lanes[1:]}
    changed = {name: changes for name, changes in found.items() if changes}
    return [
        f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} given another training "
        f"than {lanes[0][0]}: {changes}"
        for changes, names in _grouped(changed).items()
    ]


def _changes(first: Figures, figures: Figures) -> str:
    """The first few, as text; empty where nothing differs."""
    changed = [
        f"{shown(key)} {shown(theirs)} instead of {shown(ours)}"
        for key, ours, theirs in differences(first.spec, figures.spec)
        if key == "train.steps" or not covering(key, (*MAY_CHANGE, *SAID_ELSEWHERE))
    ]
    more = f" and {len(changed) - MOST_CHANGES} more" if len(changed) > MOST_CHANGES else ""
    return f"{', '.join(changed[:MOST_CHANGES])}{more}"


def _other_machines(lanes: Lanes) -> str | None:
    machines = {name: tuple(figures.environment.get(key) for key in MACHINE) for name, figures in lanes}
    if len({str(machine) for machine in machines.values()}) < 2:
        return None
    listed = _by_value({name: machine[0] or machine[1] for name, machine in machines.items()})
    return f"the lanes ran on different machines, and their speeds compare these too ({listed})"


def _other_versions(lanes: Lanes) -> str | None:
    packages = [figures.environment.get("packages") for _, figures in lanes]
    tables = [found if isinstance(found, dict) else {} for found in packages]
    names = sorted({name for table in tables for name in table})
    unlike = [name for name in names if len({str(table.get(name)) for table in tables}) > 1]
    return f"versions differ: {shown(', '.join(unlike))}" if unlike else None


def _unlike(lanes: Lanes, key: str, meaning: str) -> str | None:
    found = {name: getattr(figures, key) for name, figures in lanes}
    if len(set(found.values())) < 2:
        return None
    return f"{meaning} ({_by_value(found)})"


def _by_value(found: Mapping[str, Any]) -> str:
    """Lanes with what they have in common: `1: cpu; 2: cuda, mps`."""
    texts = {name: "unknown" if value is None else shown(value) for name, value in found.items()}
    return "; ".join(f"{text}: {', '.join(names)}" for text, names in _grouped(texts).items())


def _grouped(found: Mapping[str, T]) -> dict[T, list[str]]:
    """The names of each value, in order."""
    names: dict[T, list[str]] = {}
    for name, value in found.items():
        names.setdefault(value, []).append(name)
    return names


def _value(spec: Any, key: str) -> Any:
    for part in key.split("."):
        spec = spec.get(part) if isinstance(spec, dict) else None
    return spec
