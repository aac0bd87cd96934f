"""`deepspeed:` overrides: merged last, unknown and contradictory ones refused with both places named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from backends.deepspeed.known_keys import KNOWN
from tests.small_specs import make_spec
from xtrain import registry
from xtrain.cli import main
from xtrain.contract import Resolved
from xtrain.exchange.translate import find_translator
from xtrain.exchange.translation import placed

BACKEND = registry.load("deepspeed")


def config_with(overrides: dict[str, Any], **sections: Any) -> dict[str, Any]:
    spec = make_spec(deepspeed=overrides, **sections)
    assert BACKEND.problems(spec, 1) == []
    return cast(dict[str, Any], BACKEND.resolve(spec, 1).settings["ds_config"])


def resolved_with(overrides: dict[str, Any], **sections: Any) -> Resolved:
    return BACKEND.resolve(make_spec(deepspeed=overrides, **sections), 1)


def problems_with(overrides: dict[str, Any], **sections: Any) -> list[str]:
    return [str(problem) for problem in BACKEND.problems(make_spec(deepspeed=overrides, **sections), 1)]


def test_an_override_replaces_what_was_derived_and_leaves_the_rest() -> None:
    sharded = {"memory": {"sharding": "gradients"}}
    overrides = {"zero_optimization": {"reduce_bucket_size": 1000}}
    plain, changed = config_with({}, **sharded), config_with(overrides, **sharded)
    assert changed["zero_optimization"].pop("reduce_bucket_size") == 1000
    assert plain["zero_optimization"].pop("reduce_bucket_size") != 1000
    assert changed == plain


def test_an_override_adds_what_is_not_there() -> None:
    overrides = {"zero_optimization": {"round_robin_gradients": True}}
    zero = config_with(overrides, memory={"sharding": "gradients"})["zero_optimization"]
    assert zero["round_robin_gradients"] is True
    loud = {"log_level": "info", "comms_logger": {"enabled": True}}
    assert config_with(loud)["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"gradient_cliping": 1.0},
            "deepspeed.gradient_cliping: found 1.0, unknown to DeepSpeed; did you mean 'gradient_clipping'?",
        ),
        (
            {"zero_optimization": {"reduce_bucket_sise": 5}},
            "deepspeed.zero_optimization.reduce_bucket_sise: found 5, unknown to DeepSpeed; "
            "did you mean 'zero_optimization.reduce_bucket_size'?",
        ),
        (
            {"overlap_comm": True},
            "deepspeed.overlap_comm: found true, unknown to DeepSpeed; "
            "did you mean 'zero_optimization.overlap_comm'?",
        ),
        (
            {"zero_optimization": {"overlap_comm": "yes"}},
            "deepspeed.zero_optimization.overlap_comm: found 'yes', expected true or false; leave it out",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            "deepspeed.zero_optimization.reduce_bucket_size: found 'auto', "
            "expected a value: nobody would replace it; leave it out",
        ),
        (
            {"elasticity": {"enabled": True}},
            "deepspeed.elasticity.enabled: found true, removed from DeepSpeed; leave it out",
        ),
    ],
)
def test_a_key_that_deepspeed_would_not_take_is_refused(overrides: dict[str, Any], message: str) -> None:
    assert problems_with(overrides) == [message]


CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"train_batch_size": 16}, "deepspeed.train_batch_size", "batch.global"),
    ({"train_micro_batch_size_per_gpu": 4}, "deepspeed.train_micro_batch_size_per_gpu", "batch.micro"),
    ({"gradient_accumulation_steps": 2}, "deepspeed.gradient_accumulation_steps", "batch.global"),
    ({"gradient_clipping": 0.5}, "deepspeed.gradient_clipping", "train.clip"),
    ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage", "memory.sharding"),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "deepspeed.zero_optimization.offload_optimizer.device",
        "memory.offload.optimizer",
    ),
    ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled", "precision"),
    ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled", "precision"),
    ({"torch_autocast": {"enabled": True}}, "deepspeed.torch_autocast.enabled", "precision"),
    (
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        "deepspeed.activation_checkpointing.cpu_checkpointing",
        "memory.offload.activations",
    ),
    (
        {"activation_checkpointing": {"number_checkpoints": 2}},
        "deepspeed.activation_checkpointing.number_checkpoints",
        "memory.checkpointing.number",
    ),
    ({"optimizer": {"type": "Adam"}}, "deepspeed.optimizer.type", "optimizer"),
    ({"scheduler": {"params": {"total_num_steps": 5}}}, "deepspeed.scheduler.params", "schedule"),
]


@pytest.mark.parametrize(("overrides", "place", "other"), CONTRADICTIONS, ids=[c[1] for c in CONTRADICTIONS])
def test_a_contradiction_names_both_places(overrides: dict[str, Any], place: str, other: str) -> None:
    (message,) = problems_with(overrides)
    assert message.startswith(f"{place}: found ")
    assert f"leave it out, or change {other}" in message


def test_what_repeats_the_spec_is_no_contradiction() -> None:
    repeated = {
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0, "offload_optimizer": {"device": "none"}},
        "bf16": {"enabled": False},
    }
    assert config_with(repeated) == config_with({})


def test_a_number_of_groups_that_repeats_the_spec_is_no_contradiction() -> None:
    repeated = {"activation_checkpointing": {"number_checkpoints": 2}}
    memory = {"checkpointing": {"number": 2}}
    assert config_with(repeated, memory=memory) == config_with({}, memory=memory)


def test_a_repeated_clip_is_not_applied_twice_at_stage_0() -> None:
    assert config_with({"gradient_clipping": 1.0})["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    "overrides",
    [
        {"zero_optimization": {"memory_efficient_linear": True}},
        {"zero_force_ds_cpu_optimizer": True},
        {"prescale_gradients": True},
        {"tensorboard": {"enabled": True}},
        {"tensor_parallel": {"autotp_size": 2}},
        {"activation_checkpointing": {"partition_activations": True}},
        {"activation_checkpointing": {"profile": True}},
    ],
    ids=str,
)
def test_what_would_change_the_training_or_is_xtrains_own_is_refused(overrides: dict[str, Any]) -> None:
    (message,) = problems_with(overrides)
    assert "not to be set here: " in message


# --- without effect, or without sense --------------------------------------------------------------------

STAGE_3: dict[str, Any] = {"memory": {"sharding": "parameters"}}
DRIVE = {"device": "nvme", "path": str(Path(__file__).parent)}
SWAPPED: dict[str, Any] = {
    "memory": {"sharding": "parameters", "offload": {"optimizer": DRIVE, "parameters": DRIVE}}
}


def overrides_at(key: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    placed(tree, {key: value})
    return tree


NO_EFFECT: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
    ("zero_optimization.reduce_bucket_size", 5_000_000, {}, {"memory": {"sharding": "optimizer"}}),
    ("zero_optimization.stage3_max_live_parameters", 5, {"memory": {"sharding": "gradients"}}, STAGE_3),
    ("zero_optimization.sub_group_size", 5, {"memory": {"sharding": "optimizer"}}, STAGE_3),
    ("zero_optimization.round_robin_gradients", True, STAGE_3, {"memory": {"sharding": "gradients"}}),
    ("aio.queue_depth", 16, STAGE_3, SWAPPED),
    ("zero_optimization.offload_optimizer.pin_memory", False, STAGE_3, SWAPPED),
    ("zero_optimization.offload_optimizer.buffer_count", 8, STAGE_3, SWAPPED),
    (
        "zero_optimization.offload_optimizer.pipeline_read",
        True,
        {"memory": {"sharding": "parameters", "offload": {"optimizer": "cpu"}}},
        SWAPPED,
    ),
    ("zero_optimization.offload_param.buffer_size", 5000, STAGE_3, SWAPPED),
]


@pytest.mark.parametrize(("key", "value", "without", "with_"), NO_EFFECT, ids=[case[0] for case in NO_EFFECT])
def test_what_would_have_no_effect_is_left_out_and_told(
    key: str, value: Any, without: dict[str, Any], with_: dict[str, Any]
) -> None:
    """So one file can be run at several stages."""
    overrides = overrides_at(key, value)
    assert override_messages(overrides, **without) == override_messages(overrides, **with_) == []
    idle, plain = resolved_with(overrides, **without), resolved_with({}, **without)
    assert idle.settings == plain.settings
    assert list(idle.idle) == [*plain.idle, f"deepspeed.{key}"]
    (note,) = set(idle.notes) - set(plain.notes)
    assert note.startswith(f"deepspeed.{key} does nothing here: DeepSpeed reads it only ")
    assert ": leave it out, or set memory." in note
    read = resolved_with(overrides, **with_)
    assert f"deepspeed.{key}" not in read.idle
    assert read.settings != resolved_with({}, **with_).settings


def test_what_deepspeed_only_logs_has_no_effect_while_its_messages_are_off() -> None:
    (note,) = set(resolved_with({"steps_per_print": 5}).notes) - set(resolved_with({}).notes)
    assert note == (
        "deepspeed.steps_per_print does nothing here: DeepSpeed reads it only with log_level: info, as its "
        "messages are off otherwise: leave it out, or set deepspeed.log_level"
    )
    assert config_with({"steps_per_print": 5, "log_level": "info"})["steps_per_print"] == 5


def test_weights_of_16_bits_are_sharded_and_take_overrides_of_stage_1() -> None:
    overrides = {"zero_optimization": {"reduce_bucket_size": 5_000_000}}
    assert override_messages(overrides, precision={"dtype": "bf16", "weights": "bf16"}) == []


@pytest.mark.parametrize(
    ("overrides", "sections", "expected"),
    [
        (
            {"log_level": "inform"},
            {},
            "expected debug, info, warning, error or critical; did you mean 'info'?",
        ),
        ({"aio": {"block_size": -1}}, SWAPPED, "expected a whole number >= 1"),
        ({"aio": {"queue_depth": 0}}, SWAPPED, "expected a whole number >= 1"),
        (overrides_at("zero_optimization.offload_param.buffer_count", 0), SWAPPED, "a whole number >= 1"),
        (
            overrides_at("zero_optimization.offload_optimizer.buffer_count", 3),
            SWAPPED,
            "expected at least 4: parameter, gradient and what the optimizer keeps; use 4",
        ),
        (
            {"zero_optimization": {"zero_hpz_partition_size": 3}},
            STAGE_3,
            "expected a divisor of the number of processes (4); nearest: 2 or 4",
        ),
        (
            {"communication_data_type": "fp16"},
            {},
            "expected fp32: the gradients of fp32 weights would be rounded on their way",
        ),
        (
            {"communication_data_type": "fp16"},
            {"precision": {"dtype": "bf16", "weights": "bf16"}},
            "expected bf16 or fp32: the gradients of bf16 weights would be rounded on their way",
        ),
        ({"communication_data_type": "float16"}, {}, "expected fp32, fp16 or bf16; did you mean 'fp16'?"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_nonsense_is_refused(overrides: dict[str, Any], sections: dict[str, Any], expected: str) -> None:
    (message,) = override_messages(overrides, world=4, **sections)
    assert expected in message


@pytest.mark.parametrize("key", sorted(KNOWN))
def test_a_value_of_a_wrong_kind_is_a_problem_and_never_a_crash(key: str) -> None:
    junks: list[Any] = [None, -1, "word", [None], {"a": 1}, [[]]]
    for junk in junks:
        for message in override_messages(overrides_at(key, junk), **SWAPPED):
            assert message.startswith(f"deepspeed.{key}")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_partition_that_divides_the_processes_is_taken(size: int) -> None:
    overrides = {"zero_optimization": {"zero_hpz_partition_size": size}}
    assert override_messages(overrides, world=4, **STAGE_3) == []


@pytest.mark.parametrize("names", ["block", ["block", "head"]], ids=["one", "some"])
def test_a_list_may_be_one_word_where_deepspeed_takes_it(names: str | list[str]) -> None:
    assert override_messages(overrides_at("zero_optimization.leaf_module.names", names), **STAGE_3) == []


def test_sgd_needs_fewer_buffers_than_adam() -> None:
    overrides = overrides_at("zero_optimization.offload_optimizer.buffer_count", 2)
    assert override_messages(overrides, optimizer={"name": "sgd", "lr": 0.1}, **SWAPPED) == []


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("Gradient_Clipping", "gradient_clipping"),
        ("overlap_com", "zero_optimization.overlap_comm"),
        ("zero.round_robin_gradient", "zero_optimization.round_robin_gradients"),
        ("zero_optimisation.reduce_bucket_size", "zero_optimization.reduce_bucket_size"),
        ("aio.queue_dept", "aio.queue_depth"),
        ("flops_profiler.enabledd", "flops_profiler.enabled"),
        ("timers.throughput.synchronised", "timers.throughput.synchronized"),
        ("zero_optimization.leaf_module.name", "zero_optimization.leaf_module.names"),
    ],
)
def test_a_typo_gets_the_nearest_key(key: str, meant: str) -> None:
    (message,) = override_messages(overrides_at(key, 1))
    assert f"unknown to DeepSpeed; did you mean '{meant}'?" in message


def test_a_dotted_name_is_no_section() -> None:
    (message,) = override_messages({"zero_optimization.overlap_comm": False}, **STAGE_3)
    assert message == (
        "deepspeed.'zero_optimization.overlap_comm': found false, unknown to DeepSpeed; "
        "DeepSpeed knows no dotted names: write sections"
    )


def override_messages(overrides: dict[str, Any], world: int = 1, **sections: Any) -> list[str]:
    translator = find_translator("deepspeed")
    spec = make_spec(deepspeed=overrides, **sections)
    return [str(problem) for problem in translator.override_problems(spec, world)]


@pytest.mark.parametrize("options", [[], ["--backend", "deepspeed"], ["--backend", "cpu"]], ids=str)
def test_check_reports_it_with_line_and_column(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(
        "model: {preset: gpt2-nano}\ndata: {source: synthetic}\nbatch: {global: 8}\ntrain: {steps: 5}\n"
        "optimizer: {lr: 1e-3}\ndeepspeed:\n  zero_optimization:\n    stage: 3\n"
    )
    done = CliRunner().invoke(main, ["check", str(path), *options])
    assert done.exit_code == 2
    message = "8:12: deepspeed.zero_optimization.stage: found 3, expected 0, from memory.sharding"
    assert done.stderr.count(message) == 1


@pytest.mark.slow  # imports deepspeed
def test_the_table_of_known_keys_is_current() -> None:
    """When it is not: tests/backends/known_ds_keys.py says how to make it anew."""
    program = (
        "import json\n"
        "from tests.backends.known_ds_keys import asked_keys, known_keys, removed_keys\n"
        "print(json.dumps([known_keys(), removed_keys(), sorted(asked_keys())]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    from backends.deepspeed.known_keys import REMOVED

    known, removed, asked = json.loads(done.stdout.splitlines()[-1])
    assert known == KNOWN
    assert removed == sorted(REMOVED)
    blocks = {key.partition(".")[0] for key in KNOWN}
    assert [key for key in asked if key not in KNOWN and key not in blocks and key not in REMOVED] == [
        "bfloat16"  # its old name for bf16
    ]
