"""Which techniques would make room where a device is full, in order of what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from xtrain.contract import Moment
from xtrain.spec import dump_spec
from xtrain.spec.keys import printed
from xtrain.spec.tree import Spec

Helps = Callable[[Spec, str], bool]
"""Whether a changed spec can be run and the key that was changed has something to do."""
Change = Mapping[str, Any]
"""Dotted keys of a spec and their new values; the first is what it is about."""

WORTH = 0.05
"""Less than this share of what a device held is not worth a try."""
WEIGHTS = frozenset({"parameters", "master"})
STATE = WEIGHTS | {"gradients", "optimizer"}
ALL = STATE | {"activations", "logits", "other"}
IN_USE: Mapping[Moment, frozenset[str]] = {
    "start": WEIGHTS,
    "step": ALL,
    "update": STATE,
    "evaluation": ALL - {"gradients", "activations"},
}
"""The categories that fill a device at each moment: nothing is kept for a backward pass in an evaluation."""


@dataclass(frozen=True)
class Remedy:
    """One technique that a spec does not use."""

    forms: Sequence[Change]
    """Ways to write it; the first that the backend honours is meant."""
    eases: frozenset[str]
    """The categories of which less is held."""
    remark: str


def remedies(spec: Spec, moment: Moment, held: Mapping[str, int], helps: Helps) -> list[str]:
    """Each that would help where a device was full of `held`, as it is written in a spec.

    `held` is bytes by category; empty where that is not known.
    """
    found = []
    for remedy in _ladder(spec):
        if not _makes_room(remedy.eases & IN_USE[moment], held):
            continue
        for form in remedy.forms:
            changed = _with(spec, form)
            if changed is not None and helps(changed, next(iter(form))):
                written = " with ".join(f"{key}: {_printed(value)}" for key, value in form.items())
                found.append(f"{written} ({remedy.remark})")
                break
    return found


def _makes_room(eased: frozenset[str], held: Mapping[str, int]) -> bool:
    total = sum(held.values())
    if not eased or not total:
        return bool(eased)
    return sum(held.get(category, 0) for category in eased) >= WORTH * total


def _ladder(spec: Spec) -> Iterator[Remedy]:
    yield from _smaller_passes(spec)
    yield from _updating_at_once(spec)
    yield from _recomputing(spec)
    yield from _fewer_bits(spec)
    yield from _dividing_state(spec)
    yield from _offloading(spec)
    yield from _dividing_the_model(spec)


def _smaller_passes(spec: Spec) -> Iterator[Remedy]:
    micro, memory = spec.micro_batch, spec.techniques
    if smaller := max((part for part in range(1, micro) if micro % part == 0), default=0):
        eases = frozenset({"activations", "logits", "other"})
        change: dict[str, Any] = {"batch.micro": smaller}
        if memory.optimizer_in_backward:  # which cannot wait for several passes
            change["memory.optimizer_in_backward"] = False
        yield Remedy([change], eases, "the global batch and what is learned stay the same")
    if memory.loss_chunk == "none":
        remark = "the same loss without the whole of the logits"
        yield Remedy([{"memory.loss_chunk": "auto"}], frozenset({"logits"}), remark)


def _updating_at_once(spec: Spec) -> Iterator[Remedy]:
    """Only where nothing in the spec comes between backward and update: it says so itself otherwise."""
    memory = spec.techniques
    if not memory.optimizer_in_backward and not memory.offload.gradients.enabled:
        remark = "each weight as soon as its gradient is final, which is then let go of"
        yield Remedy([{"memory.optimizer_in_backward": True}], frozenset({"gradients"}), remark)


def _recomputing(spec: Spec) -> Iterator[Remedy]:
    chosen, eases = spec.techniques.checkpointing, frozenset({"activations"})
    if not chosen.enabled:
        remark = "the same losses for about a third more time"
        yield Remedy([{"memory.checkpointing": "auto"}], eases, remark)
    one_by_one = chosen.every == 1 or (chosen.selective is not None and chosen.selective.ratio == 1)
    if not one_by_one:
        yield Remedy(
            [{"memory.checkpointing": {"every": 1}}], eases, "block by block: usually the least memory"
        )


def _fewer_bits(spec: Spec) -> Iterator[Remedy]:
    if spec.precision.weights != "fp32":
        return
    dtype = "fp16" if spec.precision.dtype == "fp16" else "bf16"
    eases = {"activations", "logits", "other"}
    if spec.techniques.offload.optimizer.enabled:
        eases |= {"parameters", "gradients"}  # without it, an fp32 master copy comes to the device for them
    remark = "halves most activations; the losses are those of this precision"
    yield Remedy([{"precision": {"dtype": dtype, "weights": dtype}}], frozenset(eases), remark)


def _dividing_state(spec: Spec) -> Iterator[Remedy]:
    sharding, remark = spec.techniques.sharding, "divided over the processes"
    if sharding == "none":
        yield Remedy([{"memory.sharding": "optimizer"}], _updated(spec), remark)
    if sharding in ("none", "optimizer"):
        eases = _updated(spec) | {"gradients"} if sharding == "none" else frozenset({"gradients"})
        yield Remedy([{"memory.sharding": "gradients"}], eases, remark)


def _offloading(spec: Spec) -> Iterator[Remedy]:
    offload = spec.techniques.offload
    if not offload.optimizer.enabled:
        key = "memory.offload.optimizer"
        forms = [{key: "cpu"}, {key: "cpu", "memory.sharding": "optimizer"}]
        yield Remedy(forms, _updated(spec), "its state and its update on the host")
    if not offload.gradients.enabled:
        remark = "each leaves the device as soon as it is final"
        yield Remedy([{"memory.offload.gradients": "cpu"}], frozenset({"gradients"}), remark)
    if not offload.activations.enabled:
        remark = "what the backward pass needs waits on the host; recomputing is cheaper"
        yield Remedy([{"memory.offload.activations": "cpu"}], frozenset({"activations"}), remark)


def _dividing_the_model(spec: Spec) -> Iterator[Remedy]:
    devices = spec.manual.devices if spec.manual else None
    if devices and len(devices) > 1:
        if spec.manual and spec.manual.split != "auto":
            yield Remedy([{"manual.split": "auto"}], ALL, "each device takes as many blocks as fit")
    elif spec.techniques.sharding != "parameters":
        yield Remedy([{"memory.sharding": "parameters"}], ALL, "the model itself is divided")


def _updated(spec: Spec) -> frozenset[str]:
    """What only the optimizer works on."""
    return frozenset({"optimizer"} if spec.precision.weights == "fp32" else {"optimizer", "master"})


def _with(spec: Spec, change: Change) -> Spec | None:
    """`spec` with some keys changed; None where that is no valid spec or changes nothing."""
    tree: dict[str, Any] = dump_spec(spec)
    for key, value in change.items():
        *path, last = key.split(".")
        section = tree
        for name in path:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = value
    try:
        changed = Spec.model_validate(tree)
    except ValidationError:
        return None
    return None if changed == spec else changed


def _printed(value: Any) -> str:
    """As it stands in a YAML file."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_printed(one)}' for key, one in value.items())}}}"
    return printed(value)
