"""The spec's `deepspeed:` section: merged into the ds_config last, and refused where it contradicts the spec.

DeepSpeed itself ignores a mistyped key at the top level and in several blocks, so nothing goes in here
that known_keys.py does not list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from xtrain.contract import JSON, Problem
from xtrain.spec.fits import fits
from xtrain.spec.keys import covering
from xtrain.spec.problems import shown
from xtrain.spec.schema import describe
from xtrain.translation import Setting

from .known_keys import KNOWN, REMOVED

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

OWNERS = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.global, batch.micro and the number of processes",
    "gradient_clipping": "train.clip",
    "zero_optimization.stage": "memory.sharding",
    "zero_optimization.cpu_offload": "memory.offload.optimizer",
    "zero_optimization.cpu_offload_param": "memory.offload.parameters",
    "zero_optimization.offload_optimizer.device": "memory.offload.optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "memory.offload.optimizer.path",
    "zero_optimization.offload_param.device": "memory.offload.parameters",
    "zero_optimization.offload_param.nvme_path": "memory.offload.parameters.path",
    "activation_checkpointing.cpu_checkpointing": "memory.offload.activations",
    "activation_checkpointing.number_checkpoints": "memory.checkpointing.number",
    "fp16": "precision",
    "bf16": "precision",
    "bfloat16": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "optimizer": "optimizer",
    "scheduler": "schedule",
}
"""Keys of a ds_config that say what the spec says elsewhere: repeated they must agree."""
CANCELLED = "the engine cancels DeepSpeed's divisions, and counts on their being as they are"
ANOTHER = "it changes what is learned, and this spec would no longer say what was trained"
NOT_DRIVEN = "xtrain does not drive this part of DeepSpeed"
TRACKERS = "use log.trackers"
RECOMPUTED = "xtrain recomputes blocks itself, without deepspeed.checkpointing"
UNDIVIDED = f"{RECOMPUTED}, which divides their inputs over tensor-parallel ranks only"
FIXED = {
    "zero_optimization.memory_efficient_linear": "it replaces torch's linear in the whole process",
    "zero_optimization.zero_quantized_weights": ANOTHER,
    "zero_optimization.zero_quantized_nontrainable_weights": ANOTHER,
    "zero_optimization.zero_quantized_gradients": ANOTHER,
    "zero_optimization.zenflow": ANOTHER,
    "zero_optimization.compute_grad_norm": "guards, clipping and the log need the norm",
    "zero_optimization.offload_optimizer.ratio": "it needs DeepSpeed's own optimizer; xtrain passes torch's",
    "zero_optimization.offload_optimizer.super_offload": "it needs DeepSpeed's own optimizer",
    "zero_optimization.elastic_checkpoint": "xtrain saves and loads",
    "zero_optimization.load_from_fp32_weights": "xtrain saves and loads",
    "zero_allow_untested_optimizer": "xtrain passes torch's optimizer",
    "zero_force_ds_cpu_optimizer": "xtrain passes torch's optimizer; DeepSpeed's agrees only to about 6e-5",
    "activation_checkpointing.partition_activations": UNDIVIDED,
    "activation_checkpointing.contiguous_memory_optimization": UNDIVIDED,
    "activation_checkpointing.synchronize_checkpoint_boundary": RECOMPUTED,
    "activation_checkpointing.profile": RECOMPUTED,
    "prescale_gradients": CANCELLED,
    "gradient_predivide_factor": CANCELLED,
    "gradient_allreduce_op": CANCELLED,
    "managed_gradient_accumulation": CANCELLED,
    "checkpoint": "xtrain saves and loads",
    "load_universal_checkpoint": "xtrain saves and loads",
    "datastates_ckpt": "xtrain saves and loads",
    "tensorboard": TRACKERS,
    "wandb": TRACKERS,
    "csv_monitor": TRACKERS,
    "comet": TRACKERS,
    "tensor_parallel": NOT_DRIVEN,
    "expert_parallel": NOT_DRIVEN,
    "pipeline": NOT_DRIVEN,
    "hybrid_engine": NOT_DRIVEN,
    "data_efficiency": NOT_DRIVEN,
    "autotuning": NOT_DRIVEN,
    "weight_quantization": NOT_DRIVEN,
    "compile": "use train.compile",
}
"""Keys that DeepSpeed knows and this backend does not hand over, with the reason."""


def merge(settings: Iterable[Setting], spec: Spec) -> list[Setting]:
    """The settings with the overrides in their places, or at the end.

    Keys that repeat the spec are left as they are: they agree, or were refused.
    """
    merged = {setting.key: setting for setting in settings}
    for key, value in leaves(spec.deepspeed or {}):
        if covering(key, OWNERS) is None and covering(key, FIXED) is None:
            merged[key] = Setting(key, value, (f"deepspeed.{key}",))
    return list(merged.values())


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything below; an empty mapping is a value."""
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and value and "type" not in KNOWN.get(key, {}):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def override_problems(spec: Spec, declared: Iterable[Setting]) -> Iterator[Problem]:
    """What of `deepspeed:` is unknown, of a wrong type, or contradicts the spec.

    `declared` is what the rest of the spec says, as settings.
    """
    says = {setting.key: setting.value for setting in declared}
    for key, value in leaves(spec.deepspeed or {}):
        yield from _problem(key, value, says)


def _problem(key: str, value: Any, says: Mapping[str, JSON]) -> Iterator[Problem]:
    path = f"deepspeed.{key}"
    if removed := covering(key, REMOVED):
        yield Problem(path, shown(value), REMOVED[removed], "leave it out")
    elif is_section(key):
        yield Problem(path, shown(value), "expected a section", "leave it out")
    elif key not in KNOWN:
        yield Problem(path, shown(value), "unknown to DeepSpeed", nearest(key))
    elif value == "auto":
        yield Problem(path, "'auto'", "expected a value: nobody would replace it", "leave it out")
    elif not fits(value, KNOWN[key]):
        yield Problem(path, shown(value), f"expected {describe(KNOWN[key])}", "leave it out")
    elif fixed := covering(key, FIXED):
        yield Problem(path, shown(value), f"not to be set here: {FIXED[fixed]}", "leave it out")
    elif (owner := covering(key, OWNERS)) and not _agrees(value, says.get(key)):
        decided = f"{shown(says[key])}, from" if key in says else "nothing here: it is said by"
        remedy = f"leave it out, or change {OWNERS[owner]}"
        yield Problem(path, shown(value), f"expected {decided} {OWNERS[owner]}", remedy)


def _agrees(value: Any, said: JSON) -> bool:
    """Whether a repeated key says the same; where the spec says nothing, so do false, none and {}."""
    if said is None:
        return value in (None, False, "none", {})
    return value == said and isinstance(value, bool) == isinstance(said, bool)


def is_section(key: str) -> bool:
    """Whether DeepSpeed expects further keys below this one."""
    return any(known.startswith(f"{key}.") for known in KNOWN)


def nearest(key: str) -> str:
    """The known key that was probably meant: beside it, or of that name in another block."""
    if near := get_close_matches(key, KNOWN, 1, 0.8):
        return f"did you mean {near[0]!r}?"
    name = key.rpartition(".")[2]
    if elsewhere := [known for known in KNOWN if known.rpartition(".")[2] == name]:
        return f"did you mean {elsewhere[0]!r}?"
    block = key.rpartition(".")[0]
    beside = [known.rpartition(".")[2] for known in KNOWN if known.rpartition(".")[0] == block]
    return f"known here: {', '.join(sorted(beside))}" if beside else "leave it out"
