"""Problems that a spec has across its keys: each value is fine alone, together they ask the impossible.

Every check yields what was found, what was expected and the nearest thing that works, computed from
the spec at hand. What only one backend cannot honour is that backend's to refuse. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeAlias

from xtrain.contract import Problem
from xtrain.spec.check_inputs import (
    data_paths,
    data_problems,
    fit_problems,
    model_paths,
    model_problems,
    weights_paths,
)
from xtrain.spec.check_memory import (
    group_problems,
    loss_problems,
    memory_problems,
    placement_problems,
    update_problems,
)
from xtrain.spec.keys import changed_keys, printed
from xtrain.spec.nearest import divisors, either, multiples, neighbours
from xtrain.spec.tree import WSD, Launch, Spec

DYNAMIC_SCALE_KEYS = ("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")


def check_spec(
    spec: Spec,
    world: int | None = None,
    unsound: Collection[str] = (),
    here: bool = True,
    resumes: bool = False,
) -> list[Problem]:
    """Every problem across the keys of `spec`, for `world` processes (default: launch.processes).

    Sections named in `unsound` are not as given: checks that read one of them are left out. If it is to run
    `here`, paths are looked for from the current directory; where it `resumes`, not those of weights to start
    from. Nothing is raised, and no marks are attached.
    """
    if world is not None:
        spec = spec.model_copy(update={"launch": Launch(processes=world)})
    checks = (*CHECKS, *CHECKS_HERE) if here else CHECKS
    checks += CHECKS_AT_STEP_0 if here and not resumes else ()
    return [problem for check, reads in checks if reads.isdisjoint(unsound) for problem in check(spec)]


def batch_problems(spec: Spec, world: int) -> Iterator[Problem]:
    """Whether `world` processes can share the global batch in micro-batches."""
    total, micro = spec.batch.global_, spec.batch.micro
    if micro is None:
        if world > 1:
            expected = f"expected with {world} processes: without it one pass takes all of global ({total})"
            yield Problem("batch.micro", "", expected, _share_of(total, world))
        return
    per_pass = micro * world
    if total % per_pass:
        globals_ = multiples(per_pass, around=total)
        micros = neighbours(micro, divisors(total // world)) if total % world == 0 else []
        nearest = f"nearest: global {either(globals_)}" + (f", or micro {either(micros)}" if micros else "")
        expected = f"expected a multiple of micro ({micro}) x processes ({world}) = {per_pass}"
        yield Problem("batch.global", str(total), expected, nearest)


def _batch(spec: Spec) -> Iterator[Problem]:
    return batch_problems(spec, spec.launch.processes)


def _share_of(total: int, world: int) -> str:
    """What to add so that `world` processes share a global batch of about `total`."""
    if total % world == 0:
        return f"add micro {total // world}"
    offers = [f"micro {total // world} with global {total}" for total in multiples(world, around=total)]
    return f"add {', or '.join(offers)}"


def _schedule(spec: Spec) -> Iterator[Problem]:
    schedule, steps = spec.schedule, spec.train.steps
    if isinstance(schedule, WSD):
        needed = schedule.warmup + schedule.stable + schedule.decay
        if needed > steps:
            stable = schedule.stable - (needed - steps)
            found = f"warmup {schedule.warmup} + stable {schedule.stable} + decay {schedule.decay} = {needed}"
            offer = f"stable {stable}, or " if stable >= 0 else ""
            expected = f"expected at most train.steps ({steps})"
            yield Problem("schedule", found, expected, f"nearest: {offer}train.steps {needed}")
    elif schedule.warmup >= steps:
        expected = f"expected less than train.steps ({steps})"
        nearest = f"nearest: {steps - 1}, or train.steps {schedule.warmup + 1}"
        yield Problem("schedule.warmup", str(schedule.warmup), expected, nearest)


def _evaluation(spec: Spec) -> Iterator[Problem]:
    every = spec.train.eval_every
    if every and not spec.data.held_out:
        expected = "expected 0 where data.held_out is 0: there is nothing to evaluate on"
        yield Problem("train.eval_every", str(every), expected, "set data.held_out, for example 0.01")


def _best(spec: Spec) -> Iterator[Problem]:
    if spec.checkpoint.best and not spec.train.eval_every:
        expected = "expected train.eval_every above 0: the best one is that of the lowest eval_loss"
        nearest = f"set train.eval_every, for example {max(1, spec.train.steps // 10)}"
        yield Problem("checkpoint.best", "true", expected, nearest)


def _precision(spec: Spec) -> Iterator[Problem]:
    precision = spec.precision
    if precision.weights not in ("fp32", precision.dtype):
        found = f"{{dtype: {precision.dtype}, weights: {precision.weights}}}"
        alone = f"{{dtype: {precision.dtype}, weights: fp32}}"
        same = f"{{dtype: {precision.weights}, weights: {precision.weights}}}"
        yield Problem("precision", found, "expected weights fp32 or like dtype", f"use {alone} or {same}")
    if precision.dtype != "fp16":
        expected = f"expected only with dtype fp16: {precision.dtype} needs no loss scale"
        yield from _unused(spec, "precision", ("loss_scale", *DYNAMIC_SCALE_KEYS), expected, "leave it out")
    elif precision.loss_scale:
        expected = f"expected only with a dynamic scale, but loss_scale is {precision.loss_scale:g}"
        nearest = "leave it out, or use loss_scale 0"
        yield from _unused(spec, "precision", DYNAMIC_SCALE_KEYS, expected, nearest)
    else:
        yield from _first_scale(spec)


def _first_scale(spec: Spec) -> Iterator[Problem]:
    power, floor = spec.precision.initial_scale_power, spec.precision.min_loss_scale
    if math.log2(floor) > power:
        expected = f"expected at most the first scale, 2 to the power of initial_scale_power ({power})"
        nearest = f"use {2**power}, or initial_scale_power {math.ceil(math.log2(floor))}"
        yield Problem("precision.min_loss_scale", printed(floor), expected, nearest)


def _stability(spec: Spec) -> Iterator[Problem]:
    guards, steps = spec.stability, spec.train.steps
    if guards is None:
        return
    if guards.loss_spike is None:
        expected = "expected only with stability.loss_spike"
        yield from _unused(spec, "stability", ("window",), expected, "add loss_spike, for example 3")
    elif guards.window >= steps:
        expected = f"expected less than train.steps ({steps}): loss_spike has no verdict before it is full"
        nearest = f"use {steps - 1}" if steps > 1 else "leave loss_spike out"
        yield Problem("stability.window", str(guards.window), expected, nearest)


def _unused(spec: Spec, section: str, keys: Sequence[str], expected: str, nearest: str) -> Iterator[Problem]:
    """A problem for each of `keys` that is not at its default: it would have no effect."""
    changed = changed_keys(spec)
    for path in (f"{section}.{key}" for key in keys):
        if path in changed:
            yield Problem(path, printed(changed[path]), expected, nearest)


Checks: TypeAlias = "tuple[tuple[Callable[[Spec], Iterator[Problem]], frozenset[str]], ...]"
CHECKS: Checks = (
    (model_problems, frozenset({"model"})),
    (data_problems, frozenset({"data"})),
    (fit_problems, frozenset({"model", "data"})),
    (_batch, frozenset({"batch", "launch"})),
    (_schedule, frozenset({"schedule", "train"})),
    (_evaluation, frozenset({"train", "data"})),
    (_best, frozenset({"checkpoint", "train"})),
    (_precision, frozenset({"precision"})),
    (memory_problems, frozenset({"memory"})),
    (group_problems, frozenset({"memory", "model"})),
    (loss_problems, frozenset({"memory", "model"})),
    (update_problems, frozenset({"memory", "train", "batch", "launch", "stability", "precision"})),
    (placement_problems, frozenset({"manual", "model"})),
    (_stability, frozenset({"stability", "train"})),
)
"""Each check with the sections that it reads."""
CHECKS_HERE: Checks = (
    (model_paths, frozenset({"model"})),
    (data_paths, frozenset({"data"})),
)
"""Those that look at this machine."""
CHECKS_AT_STEP_0: Checks = ((weights_paths, frozenset({"model"})),)
"""Of these, what a resumed run does without."""
