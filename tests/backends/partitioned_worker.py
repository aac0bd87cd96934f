"""Counts what stage 3 holds on one rank: while it is built, loaded, and trained.

    python -m tests.backends.partitioned_worker OUT.json FOLDER

under torch.distributed.run with two processes; FOLDER has the models of `kinds`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xtrain import registry
from xtrain.contract import Batch, Job, StateKind, StepInput
from xtrain.data import open_data
from xtrain.measure.ledger import Ledger
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec

STEPS = 4
GATHER_ALL = {
    "zero_optimization": {
        "stage3_max_live_parameters": 10**9,
        "stage3_max_reuse_distance": 10**9,
        "stage3_prefetch_bucket_size": 5 * 10**7,
    }
}
"""DeepSpeed's own defaults."""


PRESET = {"preset": "gpt2-nano", "layers": 8, "hidden": 128, "heads": 4, "positions": 64}
VOCABULARY = 257


GATHER_LITTLE = {"zero_optimization": {"stage3_max_live_parameters": 123_456}}
HOST_PIECES = {"zero_optimization": {"zero_hpz_partition_size": 2}}
"""Each host keeps all weights a second time, in pieces of its own."""
LOADED = 0.01
"""Every weight of OneByOne."""


def make_spec(overrides: dict[str, Any] | None = None, model: dict[str, Any] = PRESET) -> Spec:
    return Spec.model_validate(
        {
            "model": model,
            "data": {"source": "synthetic", "seq_len": 16, "tokens": 20_000},
            "batch": {"global": 4, "micro": 1},
            "train": {"steps": STEPS},
            "optimizer": {"lr": 1e-3},
            "memory": {"sharding": "parameters"},
            "deepspeed": overrides,
        }
    )


class OneByOne:
    """A reader that makes every tensor when it is asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        return torch.full(self.shapes[name], LOADED) if kind in ("weight", "buffer") else None


def peak_bytes(ledger: Ledger) -> int:
    return sum(ledger.peaks["cpu"].values())  # tensors on meta have a size and no memory


class AliveBytes(TorchDispatchMode):
    """The most bytes in the host's memory at one time, looked at after each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.look((args, kwargs, result))
        return result

    def look(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        alive = [one for seen in self.storages.values() if (one := seen()) is not None]
        self.peak = max(self.peak, sum(one.nbytes() for one in alive))


def construct(spec: Spec, job: Job) -> dict[str, Any]:
    """The most bytes alive while the model is made and cut up, what is left, and what of it is wrong."""
    from deepspeed.runtime.zero import GatheredParameters

    from backends.deepspeed.construct import build

    backend = registry.load("deepspeed")
    config: Any = backend.resolve(spec, job.world).settings["ds_config"]
    source, alive = model_source(spec, VOCABULARY), AliveBytes()
    with alive:
        built = build(source, config, 3, job)
    gc.collect()
    pieces: list[torch.Tensor] = [p.ds_tensor for p in built.model.parameters()]  # type: ignore[attr-defined]
    whole, wrong = model_source(spec, VOCABULARY).build(), []
    for (name, expected), parameter in zip(whole.named_parameters(), built.model.parameters(), strict=True):
        with GatheredParameters([parameter]):
            if not torch.equal(parameter.data, expected):
                wrong.append(name)
    buffers = dict(built.model.named_buffers())
    wrong += [name for name, value in whole.named_buffers() if not torch.equal(value, buffers[name])]
    return {
        "peak": alive.peak,
        "kept": sum(t.numel() * t.element_size() for t in pieces),
        "whole": 4 * built.parameter_count,
        "largest": 4 * max(p.numel() for p in whole.parameters()),
        "wrong": wrong,
        "notes": [*built.notes, *source.notes],
    }


def kinds(folder: Path) -> dict[str, dict[str, Any]]:
    """Ways to say which model, by what they are called here."""
    factory = "tests.backends.built_models:"
    return {
        "preset": PRESET,
        "preset from a folder": {**PRESET, "init_from": str(folder / "preset")},
        "factory": {"factory": f"{factory}thorough"},
        "learning": {"factory": f"{factory}learning"},
        "unequal": {"factory": f"{factory}unequal"},
        "hf": {"hf": str(folder / "llama")},
        "hf with weights": {"hf": str(folder / "stored")},
        "hf under other names": {"hf": str(folder / "renamed")},
        "hf from a folder": {"hf": str(folder / "llama"), "init_from": str(folder / "stored")},
    }


def train(spec: Spec, job: Job) -> dict[str, Any]:
    """Elements gathered at once in each step, sampled around every module and at every gradient."""
    from backends.deepspeed.construct import gathered_elements

    data = open_data(spec, show_progress=False)
    backend = registry.load("deepspeed")
    resolved = backend.resolve(spec, job.world)
    engine: Any = backend.start(resolved, model_source(spec, data.vocab_size), job)
    config: Any = engine.resolved.settings["ds_config"]
    model, gathered = engine.engine.module, [0] * STEPS

    def sample(*ignored: Any) -> None:
        gathered[step] = max(gathered[step], gathered_elements(model))

    for module in model.modules():
        module.register_forward_pre_hook(sample)
        module.register_forward_hook(sample)
    for parameter in model.parameters():
        parameter.register_hook(sample)
    for step in range(STEPS):
        batches = data.micro_batches(step, engine.data_rank, engine.data_size)
        engine.train_step(StepInput(step, batches, 1e-3, data.target_tokens(step)), None, NullTrace())
    before, ledger = engine.memory().categories, Ledger(engine.holdings)
    shapes = {name: form.shape for (name, _), form in engine.state_layout().items()}
    with ledger.open():
        engine.import_state(OneByOne(shapes))
    held_bytes = weights_held_between_the_passes(engine, data.micro_batches(0, engine.data_rank, 2)[0])
    found = {
        "gathered": gathered,
        "held_bytes": held_bytes,
        "parameters": engine.parameter_count,
        "allowed": config["zero_optimization"]["stage3_max_live_parameters"],
        "categories": before,
        "import_peak": peak_bytes(ledger),
        "notes": list(engine.notes),
        "ds_config": config["zero_optimization"],
        "bucket": engine.engine.optimizer.reduce_bucket_size,
        "written": engine.resolved.files["ds_config.json"]["zero_optimization"],
    }
    engine.close()
    return found


def computes_with(spec: Spec, job: Job) -> dict[str, list[float]]:
    """Lowest and highest number of each parameter in the first forward pass after a state was loaded."""
    data, backend = open_data(spec, show_progress=False), registry.load("deepspeed")
    engine: Any = backend.start(backend.resolve(spec, job.world), model_source(spec, data.vocab_size), job)
    model, seen = engine.engine.module, {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def note(module: Any, *ignored: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.numel():
                seen[names[id(parameter)]] = [float(parameter.min()), float(parameter.max())]

    engine.import_state(OneByOne({name: tuple(p.ds_shape) for name, p in model.named_parameters()}))
    for module in model.modules():
        module.register_forward_hook(note)
    engine.evaluate(data.micro_batches(0, engine.data_rank, engine.data_size))
    engine.close()
    return seen


def weights_held_between_the_passes(engine: Any, batch: Batch) -> int:
    """Bytes of gathered weights that are still there when a forward pass has ended, whoever holds them."""
    seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(module: Any, *ignored: Any) -> None:
        for parameter in module.parameters(recurse=False):
            storage = parameter.untyped_storage()
            seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    hooks = [module.register_forward_pre_hook(note) for module in engine.engine.module.modules()]
    loss = engine.forward(batch)
    held = sum(size for storage, size in seen.values() if not storage.expired())
    for hook in hooks:
        hook.remove()
    engine.engine.backward(loss)  # so that what is gathered is let go of
    return held


def main() -> None:
    warnings.filterwarnings("ignore")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = Job(rank, rank, world, world)
    models = kinds(Path(sys.argv[2]))
    report: dict[str, Any] = {
        "trained": train(make_spec(), job),
        "unbounded": train(make_spec(GATHER_ALL), job),
        "hf trained": train(make_spec(model=models["hf"]), job),
        "factory trained": train(make_spec(GATHER_LITTLE, model=models["factory"]), job),
        "constructed": {kind: construct(make_spec(model=model), job) for kind, model in models.items()},
        "computes with": computes_with(make_spec(HOST_PIECES), job),  # last: its groups stay
    }
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
