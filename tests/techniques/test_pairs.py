"""Every technique, every pair of them, and all of them at once: the plain losses, or a refusal that says why.

Alone and in pairs on the CPU; stacks of everything also on the simulated device, where tensors really
move. Among the stacks every pair of forms occurs. A pair of one technique with itself (two forms of
checkpointing, two precisions) cannot be written in a spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest

from tests.conformance.cases import FP16
from tests.conformance.plain import train
from tests.conformance.worker import Collector
from tests.simulated.backend import simulated_backend
from xtrain import registry
from xtrain.contract import Backend, Job
from xtrain.data import open_data
from xtrain.loop import Loop
from xtrain.models.source import model_source
from xtrain.schedule import learning_rate
from xtrain.spec.check import check_spec
from xtrain.spec.tree import Spec

STEPS = 20
IN_16_BIT_STEPS = 4
"""After these, roundings in another place have grown into other losses."""
BASE: dict[str, Any] = {
    "model": {"preset": "gpt2-nano", "layers": 3, "hidden": 16, "heads": 2},
    "data": {"source": "synthetic", "seq_len": 8, "tokens": 5_000, "masked": 0.3},
    "batch": {"global": 2},
    "train": {"steps": STEPS, "clip": None},
    "optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.9},
    "schedule": {"name": "cosine", "warmup": 0},
}
"""Under SGD without clipping a wrong scale of the gradients shows."""
CLIPPED_ADAMW = {"train": {"clip": 0.5}, "optimizer": {"name": "adamw", "lr": 5e-3}}
"""For the stacks: both moments, and a norm over all devices that bites. Replaces the optimizer."""
FP32 = "fp32"
BF16_WEIGHTS = {"dtype": "bf16", "weights": "bf16"}
FP16_WEIGHTS = {**FP16, "initial_scale_power": 8}
"""No overflow in these few steps: a skipped step would hide what follows."""

TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "precision": [{"precision": "bf16"}, {"precision": BF16_WEIGHTS}, {"precision": FP16_WEIGHTS}],
    "accumulation": [{"batch": {"micro": 1}}],
    "checkpointing": [
        {"memory": {"checkpointing": form}}
        for form in (
            "auto",
            {"every": 2},
            {"number": 2},
            {"selective": {"ratio": 0.5}},
            {"selective": {"ops": "cheap"}},
        )
    ],
    "sharding": [{"manual": {"devices": ["main", "cpu"], "split": [1, 2]}}],
    "optimizer offload": [{"memory": {"offload": {"optimizer": "cpu"}}}],
    "gradient offload": [{"memory": {"offload": {"gradients": "cpu"}}}],
    "activation offload": [{"memory": {"offload": {"activations": "cpu"}}}],
    "loss chunk": [{"memory": {"loss_chunk": 5}}, {"memory": {"loss_chunk": "none"}}],
}
PAIRS = [
    (one, other)
    for first, second in combinations(TECHNIQUES, 2)
    for one in TECHNIQUES[first]
    for other in TECHNIQUES[second]
]
ALONE = [change for changes in TECHNIQUES.values() for change in changes]
FORMS = {**TECHNIQUES, "precision": [{"precision": FP32}, *TECHNIQUES["precision"]]}


def stack(precision: int, checkpointing: int) -> list[dict[str, Any]]:
    """Everything at once, in those forms of the two; the others' forms alternate."""
    place = {"precision": precision, "checkpointing": checkpointing}
    alternate = precision + checkpointing
    forms = [forms[place.get(name, alternate) % len(forms)] for name, forms in FORMS.items()]
    return [CLIPPED_ADAMW, *forms] if checkpointing % 2 else forms


STACKS = [
    stack(*places) for places in product(range(len(FORMS["precision"])), range(len(FORMS["checkpointing"])))
]

SAME_ARITHMETIC = 1e-6
"""Relative. Sums in another order: 2e-7 was the most seen in fp32."""
IN_16_BIT = 3e-4
"""What is rounded to 16 bit in another place, as in a chunk of the loss: 9e-5 was the most seen."""


def merged(*changes: Mapping[str, Any]) -> Spec:
    tree: dict[str, Any] = BASE
    for change in changes:
        tree = _over(tree, change)
    return Spec.model_validate(tree)


def _over(tree: Any, change: Any) -> Any:
    """`change` laid over `tree`, section by section."""
    if not isinstance(tree, dict) or not isinstance(change, Mapping) or "name" in change:
        return change
    return {**tree, **{key: _over(tree.get(key), value) for key, value in change.items()}}


def described(changes: Any) -> str:
    return " + ".join(str(change) for change in changes)


def losses(backend: Backend, spec: Spec) -> list[float]:
    data = open_data(spec, show_progress=False)
    engine = backend.start(backend.resolve(spec, 1), model_source(spec, data.vocab_size), Job())
    collector = Collector()
    steps = STEPS if spec.precision.dtype == FP32 else IN_16_BIT_STEPS
    Loop(engine, data, learning_rate(spec), collector, steps, audits=False).run(0, steps)
    engine.close()
    assert not any(record.skipped for record in collector.records)
    return [record.loss for record in collector.records if record.loss is not None]


@cache
def expected(precision: str, clipped_adamw: bool) -> list[float]:
    """The plain loop's in fp32; else those of the CPU with nothing but the precision."""
    base = [CLIPPED_ADAMW] if clipped_adamw else []
    changes = {str(change["precision"]): change for change in TECHNIQUES["precision"]}
    if precision == FP32:
        return train(merged(*base)).losses
    return losses(registry.load("cpu"), merged(*base, changes[precision]))


@pytest.fixture(autouse=True)
def emulated_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTRAIN_EMULATED_FP16", "1")


def trained(backend: Backend, changes: Any) -> list[float] | None:
    """The losses; None where it is refused, and then every problem says what to do instead."""
    spec = merged(*changes)
    problems = [*check_spec(spec), *backend.problems(spec, 1)]
    if problems:
        assert all(problem.expected and problem.nearest for problem in problems)
        return None
    return losses(backend, spec)


def approximately_expected(changes: Any) -> Any:
    precision = next((str(change["precision"]) for change in changes if "precision" in change), FP32)
    tolerance = SAME_ARITHMETIC if precision == FP32 else IN_16_BIT
    return pytest.approx(expected(precision, CLIPPED_ADAMW in changes), rel=tolerance)


@pytest.mark.parametrize("changes", [*([one] for one in ALONE), *PAIRS, *STACKS], ids=described)
def test_techniques_together_train_to_the_plain_losses_on_the_cpu(changes: Any) -> None:
    found = trained(registry.load("cpu"), changes)
    assert found is None or found == approximately_expected(changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", STACKS, ids=described)
def test_everything_at_once_trains_to_the_plain_losses_on_the_simulated_device(changes: Any) -> None:
    with simulated_backend() as backend:
        found = trained(backend, changes)
    assert found is None or found == approximately_expected(changes)


def test_every_pair_of_forms_is_in_a_stack() -> None:
    assert not [pair for pair in PAIRS if not any(all(one in stack for one in pair) for stack in STACKS)]


@pytest.mark.parametrize("name", ["cpu", "sim"])
def test_none_of_these_is_refused(name: str) -> None:
    """What is refused elsewhere is refused for a reason of its own, not because a test was lenient."""
    with simulated_backend() as simulated:
        backend = simulated if name == "sim" else registry.load(name)
        refused = [change for change in ALONE if backend.problems(merged(change), 1)]
        assert refused == []
        assert not [pair for pair in PAIRS if backend.problems(merged(*pair), 1)]


@pytest.mark.parametrize("base", [[], [CLIPPED_ADAMW]], ids=["sgd", "adamw"])
def test_a_technique_that_changed_the_training_would_be_seen(base: Any) -> None:
    right = merged(*base)
    wrong = merged(*base, {"optimizer": {**right.optimizer.model_dump(), "lr": right.optimizer.lr * 1.01}})
    found = losses(registry.load("cpu"), wrong)
    assert train(right).losses != pytest.approx(found, rel=10 * SAME_ARITHMETIC)
