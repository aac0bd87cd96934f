"""`translate --standalone`: a plain DeepSpeed script with that config does the same training."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from tests.conformance.cases import Case
from tests.jobs import ON_THE_CPU, run_job
from xtrain import registry
from xtrain.exchange.translation import Translator, nested
from xtrain.schedule import learning_rate
from xtrain.spec.check import check_spec
from xtrain.spec.tree import Spec

WORLD = 2
FP32_BAND, BF16_BAND = 5e-7, 1e-4
"""Relative. Seen: 1e-7 and 1.4e-5; torch has several AdamW loops (fused, foreach) that round apart."""


def deepspeed() -> Translator:
    backend: object = registry.load("deepspeed")
    assert isinstance(backend, Translator)
    return backend


def make_spec(**sections: Any) -> Spec:
    base: dict[str, Any] = {
        "model": {"preset": "gpt2-nano", "layers": 2, "hidden": 64, "heads": 2},
        "data": {"source": "synthetic", "seq_len": 32, "tokens": 40_000},
        "batch": {"global": 8, "micro": 2},
        "train": {"steps": 6, "clip": 0.5},
        "optimizer": {"lr": 2e-3},
        "schedule": {"name": "linear", "warmup": 3},
    }
    return Spec.model_validate({**base, **sections})


def ds_config(spec: Spec, world: int = WORLD) -> dict[str, Any]:
    assert check_spec(spec, world) == []
    assert deepspeed().standalone_problems(spec, world) == []
    return cast(dict[str, Any], nested(deepspeed().standalone(spec, world)))


SGD = {"name": "sgd", "lr": 0.3, "momentum": 0.9}
STATE = {"optimizer": "cpu", "gradients": "cpu"}
CASES: dict[str, dict[str, Any]] = {
    f"{precision}-{sharding}": {"memory": {"sharding": sharding}, "precision": precision}
    for precision in ("fp32", "bf16")
    for sharding in ("none", "optimizer", "gradients", "parameters")
}
CASES |= {
    f"{sharding}-{name} offloaded": {"memory": {"sharding": sharding, "offload": offload}}
    for sharding, name, offload in (
        ("optimizer", "state", STATE),
        ("gradients", "state", STATE),
        ("parameters", "state", STATE),
        ("parameters", "everything", {**STATE, "parameters": "cpu"}),
    )
}
CASES["sgd"] = {"optimizer": SGD, "train": {"steps": 6, "clip": None}, "schedule": "cosine"}
CASES["bf16-weights"] = {
    "precision": {"dtype": "bf16", "weights": "bf16"},
    "memory": {"sharding": "gradients"},
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """By case: of the script without xtrain, and of the engine that `xtrain run` uses; on two processes."""
    folder = tmp_path_factory.mktemp("standalone")
    specs = {name: make_spec(**sections) for name, sections in CASES.items()}
    cases = [
        {
            **Case(name, "deepspeed", spec.model_dump(mode="json", by_alias=True)).described(),
            "ds_config": ds_config(spec),
        }
        for name, spec in specs.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    script = "tests.backends.standalone_script"
    run_job(WORLD, script, folder / "cases.json", folder / "out.json", **ON_THE_CPU)
    found = json.loads((folder / "out.json").read_text())
    return {name: dict(zip(CASES, found[name], strict=True)) for name in found}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_plain_script_reproduces_the_losses(case: str, losses: dict[str, dict[str, list[float]]]) -> None:
    plain, xtrain = losses["plain"][case], losses["xtrain"][case]
    assert plain == pytest.approx(xtrain, rel=BF16_BAND if "bf16" in case else FP32_BAND)
    assert xtrain[0] - xtrain[-1] > 0.05  # there was something to reproduce


SCHEDULES: list[dict[str, Any]] = [
    *({"name": name, "warmup": w} for name in ("constant", "linear") for w in (0, 1, 2, 5)),
    *(
        {"name": "warmup-decay", "warmup": w, "warmup_type": t}
        for w in (0, 1, 2, 5)
        for t in ("linear", "log")
    ),
    {"name": "cosine"},
    {"name": "cosine", "min_ratio": 0.0},
]


@pytest.mark.slow  # imports deepspeed
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s.values())))
def test_deepspeeds_scheduler_has_the_specs_value_at_every_update(
    schedule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import torch
    from deepspeed.runtime import lr_schedules

    spec = make_spec(schedule=schedule)
    config = ds_config(spec)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config["optimizer"]["params"]["lr"])
    block = config.get("scheduler")
    scheduler = getattr(lr_schedules, block["type"])(optimizer, **block["params"]) if block else None
    seen = []
    for _ in range(spec.train.steps):
        seen.append(optimizer.param_groups[0]["lr"])
        if scheduler:
            scheduler.step()
    assert seen == pytest.approx([learning_rate(spec)(k) for k in range(spec.train.steps)], rel=1e-12, abs=0)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("schedule.name", {"schedule": {"name": "wsd", "stable": 5, "decay": 5}}),
    ("schedule.cycles", {"schedule": {"name": "cosine", "cycles": 1.5}}),
    ("schedule.warmup", {"schedule": {"name": "cosine", "warmup": 3}}),
    ("data.masked", {"data": {"source": "synthetic", "masked": 0.3}}),
    ("stability", {"stability": {"grad_norm": 5.0}}),
    ("precision.loss_scale", {"precision": "fp16"}),
    ("model.dropout", {"model": {"preset": "gpt2-nano", "dropout": 0.1}}),
]


@pytest.mark.parametrize(("key", "sections"), REFUSED, ids=[key for key, _ in REFUSED])
def test_what_a_ds_config_cannot_carry_is_refused_with_the_reason(key: str, sections: dict[str, Any]) -> None:
    (problem,) = deepspeed().standalone_problems(make_spec(**sections), 1)
    assert problem.path == key
    assert problem.expected
    assert problem.nearest


def test_a_fixed_loss_scale_is_carried() -> None:
    config = ds_config(make_spec(precision={"dtype": "fp16", "loss_scale": 1024.0}))
    assert config["fp16"]["loss_scale"] == 1024.0


def test_clipping_is_deepspeeds_at_every_stage() -> None:
    assert ds_config(make_spec())["gradient_clipping"] == 0.5
