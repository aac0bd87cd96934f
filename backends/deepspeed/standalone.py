"""A ds_config for plain `deepspeed.initialize`: optimizer and schedule are in it too.

The script around it brings the model (its forward returns the mean loss of a micro-batch), the data in
xtrain's order, and two parameter groups: matrices, and the others with weight_decay 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from xtrain.contract import JSON, Problem
from xtrain.exchange.translation import Setting
from xtrain.spec.keys import printed
from xtrain.spec.tree import AdamW, Constant, Cosine, Linear, Spec, WarmupDecay

from .overrides import merge
from .translate import clipping, shared_settings

SHORTEST_WARMUP = 2
"""Of DeepSpeed's schedulers: they raise warmup_num_steps to it."""
LATE = "last_batch_iteration: DeepSpeed's schedulers run one update late otherwise"


def standalone_settings(spec: Spec, world: int) -> list[Setting]:
    """Every key with its origin; meaningful where find_standalone_problems has none."""
    reason = "fixed: torch's optimizers are not on DeepSpeed's list"
    own = "fixed: torch's optimizer also with offload; DeepSpeed's CPU Adam agrees only to about 6e-5"
    return merge(
        [
            *shared_settings(spec, world, clipping(spec)),
            *_optimizer(spec),
            *_scheduler(spec),
            Setting("zero_allow_untested_optimizer", True, (), reason),
            Setting("zero_force_ds_cpu_optimizer", False, (), own),
        ],
        spec,
    )


def find_standalone_problems(spec: Spec) -> list[Problem]:
    """What a plain ds_config cannot carry, so that the losses would be others."""
    return [*_schedule_problems(spec), *_loop_problems(spec), *_scaler_problems(spec)]


def _optimizer(spec: Spec) -> Iterator[Setting]:
    optimizer, block = spec.optimizer, "optimizer.params"
    first = spec.optimizer.lr if spec.schedule.warmup == 0 else 0.0
    rule = "0 at the first update; then the scheduler's" if spec.schedule.warmup else "at the first update"
    adamw = isinstance(optimizer, AdamW)
    yield Setting("optimizer.type", "AdamW" if adamw else "SGD", ("optimizer.name",))
    yield Setting(f"{block}.lr", first, ("optimizer.lr", "schedule.warmup"), rule)
    if not isinstance(optimizer, AdamW):
        yield Setting(f"{block}.momentum", optimizer.momentum, ("optimizer.momentum",))
        return
    yield Setting(f"{block}.betas", list(optimizer.betas), ("optimizer.betas",))
    yield Setting(f"{block}.eps", optimizer.eps, ("optimizer.eps",))
    yield Setting(f"{block}.weight_decay", optimizer.weight_decay, ("optimizer.weight_decay",))
    yield Setting(f"{block}.torch_adam", True, (), "fixed: torch's own AdamW, as xtrain uses")


def _scheduler(spec: Spec) -> Iterator[Setting]:
    """None for a constant learning rate; else the one of DeepSpeed's that has this formula."""
    found = scheduler_of(spec)
    if found is None:
        return
    kind, params = found
    yield Setting("scheduler.type", kind, ("schedule.name",), "the scheduler that has this formula")
    for key, value in params.items():
        source, rule = _origin(key)
        yield Setting(f"scheduler.params.{key}", value, source, rule)


def scheduler_of(spec: Spec) -> tuple[str, Mapping[str, JSON]] | None:
    """DeepSpeed's scheduler whose value at every update is the spec's, None where there is none to name.

    DeepSpeed steps its scheduler after an update: with last_batch_iteration s its iteration at update k is
    k + s for k > 0, and update 0 has the optimizer's lr. s = 0 undoes the one update by which they run late;
    a larger s steps over the warm-up of 2 updates that they have at least.
    """
    schedule, peak = spec.schedule, spec.optimizer.lr
    warmup = max(SHORTEST_WARMUP, schedule.warmup)
    skipped = warmup - schedule.warmup
    lr: dict[str, JSON] = {"warmup_min_lr": 0.0, "warmup_max_lr": peak}
    length: dict[str, JSON] = {"total_num_steps": spec.train.steps + skipped}
    start: dict[str, JSON] = {"warmup_num_steps": warmup, "last_batch_iteration": skipped}
    match schedule:
        case Constant() if schedule.warmup:
            return "WarmupLR", {**lr, **start, "warmup_type": "linear"}
        case Linear():
            return "WarmupDecayLR", {**length, **lr, **start, "warmup_type": "linear"}
        case WarmupDecay():
            return "WarmupDecayLR", {**length, **lr, **start, "warmup_type": schedule.warmup_type}
        case Cosine() if _has_a_formula(schedule):
            # WarmupCosineLR's wave is one update ahead of its iteration: one less to step over.
            start["last_batch_iteration"] = skipped - 1
            return "WarmupCosineLR", {**length, **start, "cos_min_ratio": schedule.min_ratio}
    return None


def _has_a_formula(schedule: Cosine) -> bool:
    return schedule.warmup == 0 and schedule.cycles == 0.5


def _origin(key: str) -> tuple[tuple[str, ...], str]:
    origins: dict[str, tuple[tuple[str, ...], str]] = {
        "warmup_min_lr": ((), "fixed: warm-up starts at 0"),
        "warmup_max_lr": (("optimizer.lr",), "the peak"),
        "warmup_num_steps": (("schedule.warmup",), f"DeepSpeed has at least {SHORTEST_WARMUP}"),
        "warmup_type": (("schedule.warmup_type",), "DeepSpeed's default is log"),
        "total_num_steps": (("train.steps",), "and what last_batch_iteration steps over"),
        "cos_min_ratio": (("schedule.min_ratio",), ""),
        "last_batch_iteration": ((), f"fixed: {LATE}"),
    }
    return origins[key]


def _schedule_problems(spec: Spec) -> Iterator[Problem]:
    schedule = spec.schedule
    if schedule.name == "wsd":
        expected = "no scheduler of DeepSpeed's has this shape"
        yield Problem("schedule.name", "wsd", expected, "use linear, constant or warmup-decay")
    if isinstance(schedule, Cosine) and schedule.cycles != 0.5:
        expected = "expected 0.5: WarmupCosineLR has one half wave"
        yield Problem("schedule.cycles", printed(schedule.cycles), expected, "use 0.5")
    if isinstance(schedule, Cosine) and schedule.warmup:
        expected = "expected 0 with cosine: WarmupCosineLR's wave starts one update before its warm-up ends"
        yield Problem("schedule.warmup", str(schedule.warmup), expected, "use 0, or schedule linear")


def _loop_problems(spec: Spec) -> Iterator[Problem]:
    if spec.data.masked:
        expected = "expected 0: DeepSpeed averages the passes' means, which differ where targets are masked"
        yield Problem("data.masked", printed(spec.data.masked), expected, "use 0")
    if spec.stability is not None:
        expected = "DeepSpeed has no guards"
        yield Problem("stability", "a section", expected, "leave the section out")
    if spec.model.dropout:
        expected = "expected 0: another script draws other random numbers"
        yield Problem("model.dropout", printed(spec.model.dropout), expected, "use 0")


def _scaler_problems(spec: Spec) -> Iterator[Problem]:
    if spec.precision.weights == "fp16" and not spec.precision.loss_scale:
        expected = (
            "a dynamic scale cannot be carried: DeepSpeed 0.19.8 makes the update of a growth from halved "
            "gradients, and holds its scheduler back at an overflow"
        )
        nearest = f"use a fixed one, for example {2**10}"
        yield Problem("precision.loss_scale", "0 (dynamic)", expected, nearest)
