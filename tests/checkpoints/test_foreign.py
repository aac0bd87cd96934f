"""Other programs' files: what is in them by name, and nothing that is in them is run."""

from __future__ import annotations

import json
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from tests.mounts import limited_files
from tests.small_runs import SPEC, checkpoints, run, steps, weights
from tests.test_resume import forge_extras
from xtrain.checkpoints.foreign import matched
from xtrain.checkpoints.format import complete_checkpoints
from xtrain.cli import main
from xtrain.contract import StateKind
from xtrain.request import this_program


def import_(folder: Path, source: Path, form: str = "ds-universal", *words: str) -> Result:
    (folder / "spec.yaml").write_text(SPEC)
    command = ["checkpoint", "import", str(source), "--from", form, "--spec", str(folder / "spec.yaml")]
    return CliRunner().invoke(main, [*command, "--out", str(folder / "new"), *words], catch_exceptions=False)


@pytest.fixture
def universal(tmp_path: Path) -> Path:
    """A universal checkpoint after 4 updates, which we wrote ourselves."""
    assert run(tmp_path, "--out", tmp_path / "out", "--stop-after", 4, backend="cpu").exit_code == 0
    words = ["checkpoint", "export", str(tmp_path / "out"), "--to", "ds-universal"]
    result = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "universal")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return tmp_path / "universal"


def test_what_was_exported_is_imported_to_the_last_bit_and_goes_on(tmp_path: Path, universal: Path) -> None:
    result = import_(tmp_path, universal)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].endswith(f"--resume {tmp_path / 'new'}")
    (before,) = complete_checkpoints(tmp_path / "out" / "checkpoints")
    (after,) = complete_checkpoints(tmp_path / "new" / "checkpoints")
    after.check(hashes=True)
    kinds: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")
    for name in before.reader().keys("weight"):
        for kind in kinds:
            one, other = before.reader().read(name, kind), after.reader().read(name, kind)
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)
    assert after.state().extras[0]["optimizer_steps"] == before.state().extras[0]["optimizer_steps"] == 4
    assert run(tmp_path, "--resume", tmp_path / "new", backend="cpu").exit_code == 0
    assert steps(tmp_path / "new") == list(range(5, 13))
    assert checkpoints(tmp_path / "new") == [4, 8, 12]


def test_the_command_that_goes_on_has_what_was_set(tmp_path: Path, universal: Path) -> None:
    result = import_(tmp_path, universal, "ds-universal", "--set", "optimizer.lr=5e-4")
    command = shlex.split(result.stdout.splitlines()[-1].removeprefix("go on with: "))
    words = command[len(this_program()) :]
    assert CliRunner().invoke(main, [*words, "--backend", "cpu", "--stop-after", "5"]).exit_code == 0


def test_an_import_that_cannot_be_written_leaves_nothing_in_its_way(tmp_path: Path, universal: Path) -> None:
    with limited_files(10_000):
        result = import_(tmp_path, universal)
    assert (result.exit_code, result.stderr[:20]) == (1, "error: cannot write ")
    assert not (tmp_path / "new").exists()
    assert import_(tmp_path, universal).exit_code == 0


def test_what_a_form_cannot_carry_is_said(tmp_path: Path, universal: Path) -> None:
    words = ["checkpoint", "export", str(tmp_path / "out"), "--to", "ds-universal", "--json"]
    result = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "again")], catch_exceptions=False)
    assert (
        "random states, guards and the position in the data: xtrain's own"
        in json.loads(result.stdout)["notes"]
    )
    assert "engine.lr_scheduler.step(4)" in "".join(json.loads(result.stdout)["notes"])
    (checkpoint,) = complete_checkpoints(tmp_path / "out" / "checkpoints")
    forge_extras(checkpoint.path, lambda extras: {**extras, "optimizer_steps_of": {"head.norm.bias": 2}})
    result = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "counted")], catch_exceptions=False)
    assert "how often 1 parameters were updated: DeepSpeed counts for all together" in result.stdout
    result = CliRunner().invoke(main, [*words, "--dtype", "bf16", "--out", str(tmp_path / "third")])
    assert result.exit_code == 2
    assert "a universal checkpoint has fp32 weights" in result.stderr


class Runs:
    """A pickle that makes a file when it is read by those who run what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    tmp_path: Path, universal: Path
) -> None:
    (file,) = universal.glob("*/zero/head.norm.weight/exp_avg.pt")
    torch.save({"param": torch.ones(32), "more": Runs(tmp_path / "ran")}, file)
    result = import_(tmp_path, universal)
    assert result.exit_code == 2
    assert f"{file} is refused: it holds more than tensors" in result.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()


def test_a_missing_weight_and_a_wrong_shape_are_named_and_nothing_is_made(
    tmp_path: Path, universal: Path
) -> None:
    (place,) = universal.glob("*/zero/head.norm.weight")
    torch.save({"param": torch.ones(7)}, place / "fp32.pt")
    result = import_(tmp_path, universal)
    assert result.exit_code == 2
    assert "weight of head.norm.weight: found (7,), expected (32,)" in result.stderr
    place.rename(place.with_name("head.other.weight"))
    result = import_(tmp_path, universal)
    assert result.exit_code == 2
    assert "it has no weights of head.norm.weight (1 of " in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tag", ["../out", "/etc", "missing", ""])
def test_a_pointer_leads_to_a_folder_beside_it_or_nowhere(tmp_path: Path, universal: Path, tag: str) -> None:
    (universal / "latest_universal").write_text(tag)
    result = import_(tmp_path, universal)
    assert result.exit_code == 2
    assert "expected a folder beside it" in result.stderr


def test_the_other_form_is_proposed(tmp_path: Path, universal: Path) -> None:
    (tag,) = universal.glob("global_step*")
    result = import_(tmp_path, tag, "deepspeed")
    assert result.exit_code == 2
    assert "found a universal checkpoint; try --from ds-universal" in result.stderr
    assert import_(tmp_path, tmp_path / "nowhere", "deepspeed").exit_code == 2
    assert "spec.yaml is a file; expected a " in import_(tmp_path, tmp_path / "spec.yaml", "deepspeed").stderr


@pytest.mark.parametrize(
    "file",
    ["mp_rank_01_model_states.pt", "zero_pp_rank_0_mp_rank_03_optim_states.pt", "layer_00-model_states.pt"],
)
def test_a_model_that_is_divided_otherwise_is_refused_with_a_way(tmp_path: Path, file: str) -> None:
    (tmp_path / "middle").mkdir()
    (tmp_path / "middle" / file).touch()
    result = import_(tmp_path, tmp_path / "middle", "deepspeed")
    assert result.exit_code == 2
    assert "expected data parallelism alone; make it universal with " in result.stderr


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (["a.b"], ["a.b"]),
        (["model.a.b"], ["a.b"]),
        (["a.b"], ["module.a.b"]),
        (["model.a.b"], ["module.a.b"]),
    ],
)
def test_wrappers_change_names_at_the_front_alone(ours: list[str], theirs: list[str]) -> None:
    assert [matched(ours, theirs)(name) for name in ours] == theirs


def as_deepspeed_names_it(monkeypatch: pytest.MonkeyPatch, module: str, name: str, **values: Any) -> Any:
    """An object whose pickle says that it is DeepSpeed's."""
    made = type(name, (), {"__module__": module, "__qualname__": name})
    parts = module.split(".")
    for length in range(1, len(parts) + 1):  # the library itself is not imported: that takes seconds
        full = ".".join(parts[:length])
        monkeypatch.setitem(sys.modules, full, types.ModuleType(full))
    setattr(sys.modules[module], name, made)
    one = made()
    vars(one).update(values)
    return one


def test_a_dynamic_loss_scale_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.deepspeed.stored import open_state

    scaler = as_deepspeed_names_it(
        monkeypatch,
        "deepspeed.runtime.fp16.loss_scaler",
        "DynamicLossScaler",
        cur_scale=1024.0,
        cur_hysteresis=1,
        cur_iter=9,
        last_overflow_iter=4,
    )
    rank = {
        "loss_scaler": scaler,
        "partition_count": 1,
        "fp32_flat_groups": [torch.arange(6.0)],
        "optimizer_state_dict": {"state": {0: {"step": 3, "exp_avg": torch.ones(6)}}, "param_groups": []},
    }
    torch.save({"optimizer_state_dict": rank}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    model = {
        "global_steps": 9,
        "param_shapes": [{"a": torch.Size([2, 2]), "b": torch.Size([2])}],
        "module": {},
    }
    torch.save(model, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    found = open_state(tmp_path, "deepspeed")
    assert found.loss_scaler == {"scale": 1024.0, "hysteresis": 1, "steps": 9, "last_overflow": 4}
    assert (found.step, found.optimizer_steps) == (9, 3)
    second = found.read("b", "weight")
    assert second is not None
    assert second.tolist() == [4.0, 5.0]
    assert found.read("b", "exp_avg_sq") is None


def test_a_folder_of_hugging_faces_form_becomes_step_0(tmp_path: Path) -> None:
    assert run(tmp_path, "--out", tmp_path / "out", "--stop-after", 4, backend="cpu").exit_code == 0
    refused = import_(tmp_path, tmp_path / "out", "hf")
    assert refused.exit_code == 2
    assert f"{tmp_path / 'out'} has no config.json; expected a folder that" in refused.stderr
    words = [
        "checkpoint",
        "export",
        str(tmp_path / "out"),
        "--to",
        "safetensors",
        "--out",
        str(tmp_path / "hf"),
    ]
    assert CliRunner().invoke(main, words).exit_code == 0
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    result = import_(tmp_path, tmp_path / "hf", "hf")
    assert result.exit_code == 0, result.output
    (before,) = complete_checkpoints(tmp_path / "out" / "checkpoints")
    (after,) = complete_checkpoints(tmp_path / "new" / "checkpoints")
    assert after.step == 0
    stored, found = (one.reader().read("head.norm.weight", "weight") for one in (before, after))
    assert stored is not None
    assert found is not None
    assert torch.equal(found, stored)
    assert after.reader().keys("exp_avg") == []
    for reached in (5, 12):
        leg = ("--resume", tmp_path / "new", "--stop-after", reached)
        assert run(tmp_path, *leg, backend="cpu").exit_code == 0
    from_weights = tmp_path / "from_weights"
    options: dict[str, Any] = {"backend": "cpu", "model__init_from": tmp_path / "hf"}
    assert run(tmp_path, "--out", from_weights, **options).exit_code == 0
    assert weights(tmp_path / "new", 12) == weights(from_weights, 12)
