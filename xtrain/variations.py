"""Lanes that differ in more than the backend: one spec key varied, or the ladder of techniques."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import yaml

from xtrain.errors import RequestError
from xtrain.lanes import Lane
from xtrain.rungs import RUNGS, rung_overrides
from xtrain.spec.tree import Spec

MOST_LANES = 60


def varied(lanes: Sequence[Lane], variations: Sequence[str]) -> list[Lane]:
    """Every lane with every combination of values; `variations` are words such as `batch.micro=4,8,16`."""
    choices = [[f"{key}={value}" for value in values] for key, values in map(_parse, variations)]
    keys = [choice[0].partition("=")[0] for choice in choices]
    if len(set(keys)) < len(keys):
        raise RequestError(f"--vary: a key stands twice in {', '.join(keys)}; name each key once")
    found = [
        replace(lane, overrides=chosen, label=" ".join(chosen))
        for lane in lanes
        for chosen in product(*choices)
    ]
    if len(found) > MOST_LANES:
        raise RequestError(f"--vary: found {len(found)} lanes, expected at most {MOST_LANES}")
    return found


def ladder(lanes: Sequence[Lane], spec: Spec) -> list[Lane]:
    """Each lane on each rung."""
    found = []
    for lane in lanes:
        steps = rung_overrides(spec, lane.processes or spec.launch.processes)
        for number, (rung, overrides) in enumerate(zip(RUNGS, steps, strict=True)):
            found.append(replace(lane, overrides=tuple(overrides), label=rung.name, rung=number))
    return found


def _parse(variation: str) -> tuple[str, list[str]]:
    """Key and values, each as it was typed: YAML itself says where one ends, `{every: 2}` is one."""
    key, sign, text = variation.partition("=")
    expected = "expected KEY=VALUE,VALUE such as batch.micro=4,8,16"
    if not sign or not key.strip():
        raise RequestError(f"--vary {variation!r}: {expected}")
    listed = f"[{text}]"
    try:
        node = yaml.compose(listed, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise RequestError(f"--vary {variation!r}: {expected}")
    values = [listed[one.start_mark.index : one.end_mark.index] for one in node.value]
    if len(set(values)) < len(values):
        raise RequestError(f"--vary {variation!r}: a value stands twice; name each value once")
    return key.strip(), values
