"""What of a ds_config the spec has no word for: a `deepspeed:` override, or a line on the list."""

from __future__ import annotations

from typing import Any

from xtrain.errors import SpecError
from xtrain.exchange.translation import Tree, placed
from xtrain.spec.keys import covering
from xtrain.spec.problems import find_faults, shown, translate
from xtrain.spec.tree import Spec

from .known_keys import KNOWN, REMOVED
from .leaves import Leaves, says_nothing
from .overrides import FIXED, OWNERS, idle_overrides, nearest, override_problems
from .translate import declared_settings, engine_settings

SILENT = ("zero_allow_untested_optimizer", "zero_optimization.memory_efficient_linear")
"""Keys of ours that say nothing about a training."""


def import_overrides(found: Leaves, tree: Tree) -> Tree:
    """What xtrain would set otherwise, and may be set so; the rest goes onto the list."""
    sized, unsized = settings_with_sizes(tree)
    ours = {key: unsized.get(key) for key in sized}
    wanted: dict[str, Any] = {}
    for key, value in found.remaining():
        if (reason := _not_carried(key)) is None:
            number = int(value) if KNOWN[key].get("type") == "integer" else value
            if number != ours.get(key, KNOWN[key].get("default")):
                wanted[key] = number
        elif not says_nothing(key, value) and key not in SILENT and (key, value) not in ours.items():
            found.left_out.append(f"{key}: {shown(value)}: {reason}")
    return _honoured(wanted, tree, found)


def _not_carried(key: str) -> str | None:
    """Why a key is not put into `deepspeed:`; None where it is."""
    if removed := covering(key, REMOVED):
        return REMOVED[removed]
    if key not in KNOWN:
        return f"unknown to DeepSpeed; {nearest(key)}"
    if fixed := covering(key, FIXED):
        return FIXED[fixed]
    if owner := covering(key, OWNERS):
        return f"the spec has no word for it beside {OWNERS[owner]}"
    return None


def _honoured(wanted: dict[str, Any], tree: Tree, found: Leaves) -> Tree:
    """Those that the spec takes as overrides."""
    rest: Tree = {}
    placed(rest, wanted)
    spec, world = _spec({**tree, "deepspeed": rest}, {"preset": "gpt2"}), _world(tree)
    problems = override_problems(spec, world, declared_settings(spec, world))
    reasons = {one.path: one.expected for one in problems} | idle_overrides(spec)
    honoured: Tree = {}
    for key, value in wanted.items():
        if reason := reasons.get(f"deepspeed.{key}"):
            found.left_out.append(f"{key}: {shown(value)}: {reason}")
        else:
            placed(honoured, {key: value})
    return honoured


def settings_with_sizes(tree: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """What xtrain makes of the imported spec with a model of known sizes, and with one of unknown sizes."""
    with_sizes, without = ({"preset": "gpt2"}, {"factory": "stand:in"})
    return _settings(tree, with_sizes), _settings(tree, without)


def _settings(tree: Tree, model: Tree) -> dict[str, Any]:
    return {one.key: one.value for one in engine_settings(_spec(tree, model), _world(tree))}


def _world(tree: Tree) -> int:
    processes: int = tree.get("launch", {}).get("processes", 1)
    return processes


def _spec(tree: Tree, model: Tree) -> Spec:
    """The imported spec as far as it tells what goes into a ds_config, with `model`."""
    names = ("batch", "memory", "precision", "deepspeed")
    optimizer = {"lr": 1.0, **tree.get("optimizer", {})}
    rest = {"data": {"source": "synthetic"}, "train": {"steps": 1}, "optimizer": optimizer}
    data: Tree = {"model": model, **rest, **{name: tree[name] for name in names if name in tree}}
    if problems := translate(find_faults(data), data):
        raise SpecError("the spec made from the ds_config", problems)
    return Spec.model_validate(data)
