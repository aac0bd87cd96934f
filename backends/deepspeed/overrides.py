"""The spec's `deepspeed:` section: merged into the ds_config last, and refused where it contradicts the spec.

DeepSpeed itself ignores a mistyped key at the top level and in several blocks, so nothing goes in here
that known_keys.py does not list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from xtrain.contract import JSON, Problem
from xtrain.exchange.translation import Setting
from xtrain.spec.fits import fits
from xtrain.spec.keys import covering
from xtrain.spec.problems import shown
from xtrain.spec.schema import describe

from .effects import unfit, unmet
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
UNREAD = "DeepSpeed 0.19.8 does nothing with it"
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
    "zero_optimization.allgather_partitions": UNREAD,
    "zero_optimization.cpu_offload_use_pin_memory": "use pin_memory of offload_optimizer or offload_param",
    "zero_optimization.legacy_stage1": "DeepSpeed refuses it",
    "zero_optimization.pipeline_loading_checkpoint": "xtrain saves and loads",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "xtrain has no such optimizer",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "xtrain saves and loads",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it needs DeepSpeed's own optimizer",
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
    "dataloader_drop_last": "xtrain brings the data",
    "vocabulary_size": UNREAD,
    "disable_allgather": UNREAD,
    "use_data_before_expert_parallelism": NOT_DRIVEN,
    "seq_parallel_communication_data_type": NOT_DRIVEN,
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

    Keys that repeat the spec are left as they are: they agree, or were refused. Those that DeepSpeed would
    not read here are left out (idle_overrides).
    """
    merged = {setting.key: setting for setting in settings}
    for key, value in leaves(spec.deepspeed or {}):
        if _is_free(key) and unmet(key, spec) is None:
            merged[key] = Setting(key, value, (f"deepspeed.{key}",))
    return list(merged.values())


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything below; an empty mapping is a value.

    A name that itself has a dot is put in quotes: DeepSpeed does not know it.
    """
    for name, value in tree.items():
        key = f"{above}{repr(name) if '.' in str(name) else name}"
        if isinstance(value, Mapping) and value and "type" not in KNOWN.get(key, {}):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def override_problems(spec: Spec, world: int, declared: Iterable[Setting]) -> Iterator[Problem]:
    """What of `deepspeed:` is unknown, of a wrong type, without sense, or contradicts the spec.

    `declared` is what the rest of the spec says, as settings.
    """
    says = {setting.key: setting.value for setting in declared}
    for key, value in leaves(spec.deepspeed or {}):
        found = _misfit(key, value) or _contradiction(key, value, says) or _senseless(key, value, spec, world)
        if found is not None:
            yield Problem(f"deepspeed.{key}", shown(value), *found)


def _misfit(key: str, value: Any) -> tuple[str, str] | None:
    """What was expected of a key that DeepSpeed would not take, or not as it is, and what to do."""
    if removed := covering(key, REMOVED):
        return REMOVED[removed], "leave it out"
    if is_section(key):
        return "expected a section", "leave it out"
    if key not in KNOWN:
        return "unknown to DeepSpeed", nearest(key)
    if value == "auto":
        return "expected a value: nobody would replace it", "leave it out"
    if not fits(value, KNOWN[key]):
        return f"expected {describe(KNOWN[key])}", _nearest_value(value, KNOWN[key])
    return None


def _contradiction(key: str, value: Any, says: Mapping[str, JSON]) -> tuple[str, str] | None:
    """What is wrong with a key that is not to be set here, or that another one of the spec decides."""
    if fixed := covering(key, FIXED):
        return f"not to be set here: {FIXED[fixed]}", "leave it out"
    owner = covering(key, OWNERS)
    if owner is None or _agrees(value, says.get(key)):
        return None
    decided = f"{shown(says[key])}, from" if key in says else "nothing here: it is said by"
    return f"expected {decided} {OWNERS[owner]}", f"leave it out, or change {OWNERS[owner]}"


def _senseless(key: str, value: Any, spec: Spec, world: int) -> tuple[str, str] | None:
    """What is wrong with the value of a key that DeepSpeed reads here."""
    if not _is_free(key) or unmet(key, spec) is not None:
        return None
    return unfit(key, value, spec, world)


def idle_overrides(spec: Spec) -> dict[str, str]:
    """Overrides that DeepSpeed knows and does not read here, such as another stage's, with the reason."""
    return {
        f"deepspeed.{key}": f"DeepSpeed reads it only {condition.only}: leave it out, or {condition.remedy}"
        for key, _ in leaves(spec.deepspeed or {})
        if key in KNOWN and _is_free(key) and (condition := unmet(key, spec)) is not None
    }


def override_notes(spec: Spec) -> dict[str, str]:
    """The same as sentences for people."""
    return {key: f"{key} does nothing here: {reason}" for key, reason in idle_overrides(spec).items()}


def _is_free(key: str) -> bool:
    """Whether it is said nowhere else, and is the user's to set."""
    return covering(key, OWNERS) is None and covering(key, FIXED) is None


def _agrees(value: Any, said: JSON) -> bool:
    """Whether a repeated key says the same; where the spec says nothing, so do false, none and {}."""
    if said is None:
        return value in (None, False, "none", {})
    return value == said and isinstance(value, bool) == isinstance(said, bool)


def is_section(key: str) -> bool:
    """Whether DeepSpeed expects further keys below this one."""
    return any(known.startswith(f"{key}.") for known in KNOWN)


def nearest(key: str) -> str:
    """The known key that was probably meant: beside it, or of such a name in another block."""
    unquoted = key.replace("'", "")
    if unquoted in KNOWN:
        return "DeepSpeed knows no dotted names: write sections"
    if near := get_close_matches(unquoted.lower(), KNOWN, 1, 0.8):
        return f"did you mean {near[0]!r}?"
    block, _, name = unquoted.rpartition(".")
    names = {known.rpartition(".")[2]: known for known in reversed(KNOWN)}
    if near := get_close_matches(name.lower(), names, 1, 0.8):
        return f"did you mean {names[near[0]]!r}?"
    beside = [known.rpartition(".")[2] for known in KNOWN if known.rpartition(".")[0] == block]
    return f"known here: {', '.join(sorted(beside))}" if block and beside else "leave it out"


def _nearest_value(value: Any, schema: Mapping[str, Any]) -> str:
    """The word that was probably meant, where one was expected."""
    words = [word for word in schema.get("enum", []) if isinstance(word, str)]
    near = get_close_matches(str(value).lower(), words, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else "leave it out"
