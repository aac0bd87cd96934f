"""Layer sharding and offload where things really move: what lives where, what crosses, what it saves."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.conformance.cases import ADAMW, FP16, SGD_UNCLIPPED, Lane, Training
from tests.conformance.plain import Curve, train
from tests.conformance.worker import Collector
from tests.simulated.backend import simulated_backend
from tests.simulated.counting import MEMORY, TRAFFIC
from tests.whole_state import whole_state
from xtrain import registry
from xtrain.contract import Backend, Job, StateKind, StepInput
from xtrain.data import open_data
from xtrain.loop import Loop
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.schedule import learning_rate
from xtrain.spec.tree import Spec

HOST, SIM, SIM_1 = torch.device("cpu"), torch.device("sim", 0), torch.device("sim", 1)
STEPS = 20
MIXED_STEPS = 4
"""With 16 bits, where roundings soon differ."""
MICRO_BATCHES = 2
MODEL = {"preset": "gpt2-nano", "layers": 4, "hidden": 64, "heads": 2}
HIDDEN_BYTES = 4 * 32 * 64 * 4
"""Of one micro-batch's hidden state: sequences, tokens, width, fp32."""

HALVES = {"devices": ["main", "cpu"], "split": [2, 2]}
TWO_AND_HOST = {"devices": ["main", "sim:1", "cpu"], "split": [0.5, 0.25, 0.25]}
BACK_AGAIN = {"devices": ["main", "cpu", "main"], "split": [1, 2, 1]}
STATE = {"optimizer": "cpu", "gradients": "cpu"}
ALL = {**STATE, "activations": "cpu"}
GROUPS = {"every": 3}
"""Of four blocks, two and two: the first group lies across the boundary."""
WAYS: dict[str, dict[str, Any]] = {
    "halves": {"manual": HALVES},
    "three devices": {"manual": TWO_AND_HOST},
    "back again": {"manual": BACK_AGAIN},
    "optimizer": {"memory": {"offload": {"optimizer": "cpu"}}},
    "gradients": {"memory": {"offload": {"gradients": "cpu"}}},
    "activations": {"memory": {"offload": {"activations": "cpu"}}},
    "halves, groups": {"manual": HALVES, "memory": {"checkpointing": GROUPS}},
    "halves, cheap ops": {"manual": HALVES, "memory": {"checkpointing": {"selective": {"ops": "cheap"}}}},
    "activations, groups": {"memory": {"offload": {"activations": "cpu"}, "checkpointing": GROUPS}},
    "halves, activations": {"manual": HALVES, "memory": {"offload": {"activations": "cpu"}}},
    "all": {"manual": HALVES, "memory": {"offload": ALL, "checkpointing": GROUPS, "loss_chunk": 16}},
}
PRECISIONS: dict[str, Any] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "bf16 weights": {"dtype": "bf16", "weights": "bf16"},
    "fp16": FP16,
    "fp16 autocast": {**FP16, "weights": "fp32"},
}


def spec_of(way: Mapping[str, Any], **changes: Any) -> Spec:
    fields = {"model": MODEL, "steps": STEPS, "accumulation": MICRO_BATCHES, **changes}
    training = Training("placed", memory=way.get("memory", {}), manual=way.get("manual"), **fields)
    return Spec.model_validate(training.on(Lane("cpu")).spec)


def start(backend: Backend, spec: Spec) -> Any:
    """The engine; its own attributes are looked at here."""
    vocab_size = open_data(spec, show_progress=False).vocab_size
    return backend.start(backend.resolve(spec, 1), model_source(spec, vocab_size), Job())


def step(engine: Any, spec: Spec, number: int = 0) -> None:
    data = open_data(spec, show_progress=False)
    batches = data.micro_batches(number, 0, 1)
    engine.train_step(StepInput(number, batches, 1e-3, data.target_tokens(number)), None, NullTrace())


def curve(backend: Backend, spec: Spec) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    """Losses, norms (0 for that of a skipped step), and the weights at the end."""
    engine = start(backend, spec)
    collector = Collector()
    data = open_data(spec, show_progress=False)
    loop = Loop(engine, data, learning_rate(spec), collector, 7, spec.train.eval_every, audits=False)
    loop.run(0, spec.train.steps)
    state = {name: value.numpy() for (name, kind), value in whole_state(engine).items() if kind == "weight"}
    engine.close()
    losses = [number for r in collector.records for number in (r.loss, r.eval_loss) if number is not None]
    return losses, [r.grad_norm or 0.0 for r in collector.records], state


@cache
def plain_curve() -> Curve:
    return train(spec_of({}, optimizer=SGD_UNCLIPPED, clip=None))


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_norms_are_those_of_the_plain_loop(simulated: Backend, way: str) -> None:
    spec = spec_of(WAYS[way], optimizer=SGD_UNCLIPPED, clip=None)
    losses, norms, _ = curve(simulated, spec)
    expected = plain_curve()
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(norms, expected.norms, rtol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mixed_precision_is_the_same_with_everything_on(
    simulated: Backend, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same device without it; the other half of the layers is on a second one of its kind."""
    monkeypatch.setenv("XTRAIN_EMULATED_FP16", "1")
    everything = {**WAYS["all"], "manual": {"devices": ["main", "sim:1"], "split": [2, 2]}}
    training = {"steps": MIXED_STEPS, "eval_every": MIXED_STEPS}
    changes = {"precision": PRECISIONS[precision], "optimizer": ADAMW, **training}
    plain = curve(simulated, spec_of({"memory": {"loss_chunk": 16}}, **changes))
    found = curve(simulated, spec_of(everything, **changes))
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], plain[1], rtol=1e-6)
    for name, value in plain[2].items():
        np.testing.assert_allclose(found[2][name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def places(engine: Any) -> dict[str, set[torch.device]]:
    """Of stem and head, and of each block: where weights, masters and moments are."""
    found: dict[str, set[torch.device]] = {}
    for name, parameter in engine.model.named_parameters():
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks") else "rest"
        updated = engine.weights.updated[name]
        moments = [value for key, value in engine.optimizer.state[updated].items() if key != "step"]
        found.setdefault(part, set()).update({parameter.device, updated.device, *(m.device for m in moments)})
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16 weights"])
def test_a_blocks_weights_masters_and_moments_are_beside_it(simulated: Backend, precision: str) -> None:
    spec = spec_of(WAYS["three devices"], precision=PRECISIONS[precision])
    engine = start(simulated, spec)
    step(engine, spec)
    where = {"rest": SIM, "blocks.0": SIM, "blocks.1": SIM, "blocks.2": SIM_1, "blocks.3": HOST}
    assert places(engine) == {part: {device} for part, device in where.items()}
    engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16 weights"])
def test_with_the_optimizer_offloaded_only_the_weights_are_on_the_device(
    simulated: Backend, precision: str
) -> None:
    spec = spec_of({"memory": {"offload": STATE}}, precision=PRECISIONS[precision])
    engine = start(simulated, spec)
    step(engine, spec)
    assert {p.device for p in engine.model.parameters()} == {SIM}
    assert {p.device for p in engine.weights.updated.values()} == {HOST}
    assert {p.dtype for p in engine.weights.updated.values()} == {torch.float32}
    moments = [state["exp_avg"] for state in engine.optimizer.state.values()]
    assert len(moments) == len(engine.weights.updated)
    assert {moment.device for moment in moments} == {HOST}
    assert engine.optimizer.defaults["fused"]
    engine.close()


def gradient_places(engine: Any, spec: Spec) -> list[dict[str, int]]:
    """Where in memory the optimizer found each gradient, at two updates."""
    found: list[dict[str, int]] = []

    def look(*ignored: Any) -> None:
        updated = engine.weights.updated.items()
        found.append({name: p.grad.data_ptr() for name, p in updated if p.grad is not None})

    engine.optimizer.register_step_pre_hook(look)
    for number in range(2):
        step(engine, spec, number)
    engine.close()
    return found


@pytest.mark.parametrize("offload", [STATE, {"optimizer": "cpu"}], ids=["gradients too", "optimizer"])
def test_16_bit_gradients_are_widened_on_the_host_into_the_same_memory_at_every_update(
    simulated: Backend, offload: dict[str, str]
) -> None:
    spec = spec_of({"memory": {"offload": offload}}, precision=PRECISIONS["bf16 weights"])
    engine = start(simulated, spec)
    first, second = gradient_places(engine, spec)
    assert first == second
    assert len(set(first.values())) == len(engine.weights.updated)


def test_what_an_update_within_the_backward_pass_widens_is_not_kept(simulated: Backend) -> None:
    memory = {"optimizer_in_backward": True, "offload": {"optimizer": "cpu"}}
    changes = {"precision": PRECISIONS["bf16 weights"], "accumulation": 1}
    spec = spec_of({"memory": memory}, clip=None, **changes)
    engine = start(simulated, spec)
    step(engine, spec)
    assert not engine.weights.widened
    engine.close()


def copies(
    way: Mapping[str, Any], backend: Backend, **changes: Any
) -> dict[tuple[str, str], tuple[int, int]]:
    """Number and bytes of the copies in one step, after a first one."""
    spec = spec_of(way, clip=None, **changes)
    engine = start(backend, spec)
    step(engine, spec)
    TRAFFIC.clear()
    step(engine, spec, 1)
    found = {between: (one.count, one.bytes) for between, one in TRAFFIC.copies.items()}
    engine.close()
    return found


INPUTS = (2 * MICRO_BATCHES, 2 * MICRO_BATCHES * 4 * 32 * 8)
"""Tokens and targets."""
NORM = (1, 4)


@pytest.mark.parametrize("way", ["halves", "halves, groups", "halves, cheap ops"])
def test_activations_cross_each_boundary_once_each_way(simulated: Backend, way: str) -> None:
    """Hidden state out and back home, its gradient likewise; recomputing copies nothing again."""
    hidden = (2 * MICRO_BATCHES, 2 * MICRO_BATCHES * HIDDEN_BYTES)
    found = copies(WAYS[way], simulated)
    assert found.pop(("sim:0", "cpu")) == hidden
    assert found.pop(("cpu", "sim:0")) == tuple(map(sum, zip(hidden, INPUTS, NORM, strict=True)))
    assert not found


def test_a_hidden_state_goes_from_device_to_device_without_a_detour(simulated: Backend) -> None:
    one_way = (MICRO_BATCHES, MICRO_BATCHES * HIDDEN_BYTES)
    found = copies(WAYS["three devices"], simulated)
    assert found == {
        ("sim:0", "sim:1"): one_way,
        ("sim:1", "cpu"): one_way,
        ("cpu", "sim:1"): one_way,
        ("sim:1", "sim:0"): tuple(map(sum, zip(one_way, NORM, strict=True))),
        ("sim:0", "cpu"): one_way,
        ("cpu", "sim:0"): tuple(map(sum, zip(one_way, INPUTS, NORM, strict=True))),
    }


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16 weights", 2)])
def test_gradients_cross_once_a_micro_batch_and_new_weights_once_a_step(
    simulated: Backend, precision: str, size: int
) -> None:
    spec = spec_of({})
    parameters = list(model_source(spec, 257).build().parameters())
    count, total = len(parameters), size * sum(p.numel() for p in parameters)
    found = copies({"memory": {"offload": STATE}}, simulated, precision=PRECISIONS[precision])
    assert found[("sim:0", "cpu")] == (MICRO_BATCHES * count, MICRO_BATCHES * total)
    assert found[("cpu", "sim:0")] == (count + INPUTS[0], total + INPUTS[1])
    only_optimizer = {"memory": {"offload": {"optimizer": "cpu"}}}
    found = copies(only_optimizer, simulated, precision=PRECISIONS[precision])
    assert found[("sim:0", "cpu")] == (count, total)  # accumulated on the device


LARGER = {"preset": "gpt2-nano", "layers": 8, "hidden": 128, "heads": 4, "positions": 128}


def memory_of_a_step(backend: Backend, way: Mapping[str, Any], precision: Any = "fp32") -> tuple[int, int]:
    """Most bytes on the device during a step, and those left when the engine is closed."""
    gc.collect()
    before = MEMORY[0].live_bytes
    memory = {"loss_chunk": "none", **way.get("memory", {})}
    spec = spec_of({**way, "memory": memory}, model=LARGER, precision=precision)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"seq_len": 128})})
    engine = start(backend, spec)
    step(engine, spec)
    MEMORY[0].reset_peak()
    step(engine, spec, 1)
    peak = MEMORY[0].peak_bytes - before
    engine.close()
    del engine
    gc.collect()
    return peak, MEMORY[0].live_bytes - before


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Of the device, in one step of the same model and micro-batch."""
    halves = {"devices": ["main", "cpu"], "split": [4, 4]}
    stack = {"offload": STATE, "checkpointing": GROUPS, "loss_chunk": 64}
    ways: dict[str, tuple[dict[str, Any], Any]] = {
        "plain": ({}, "fp32"),
        "halves": ({"manual": halves}, "fp32"),
        "optimizer": ({"memory": {"offload": {"optimizer": "cpu"}}}, "fp32"),
        "gradients": ({"memory": {"offload": STATE}}, "fp32"),
        "activations": ({"memory": {"offload": {"activations": "cpu"}}}, "fp32"),
        "stack": ({"memory": stack, "manual": halves}, PRECISIONS["bf16 weights"]),
    }
    found = {}
    with simulated_backend() as backend:
        for name, (way, precision) in ways.items():
            found[name], left = memory_of_a_step(backend, way, precision)
            assert left == 0, name
    return found


def parameter_bytes() -> int:
    return 4 * sum(p.numel() for p in model_source(spec_of({}, model=LARGER), 257).build().parameters())


@pytest.mark.slow
def test_half_of_the_layers_elsewhere_is_half_of_the_memory(peaks: dict[str, int]) -> None:
    assert peaks["halves"] <= 0.55 * peaks["plain"]


@pytest.mark.slow
def test_the_offloaded_optimizer_takes_its_two_moments_with_it_and_gradients_themselves(
    peaks: dict[str, int],
) -> None:
    assert peaks["optimizer"] <= peaks["plain"] - 2 * parameter_bytes()
    assert peaks["gradients"] <= peaks["plain"] - 2.9 * parameter_bytes()  # one or two are on their way


@pytest.mark.slow
def test_offloaded_activations_leave_weights_state_and_little_more(peaks: dict[str, int]) -> None:
    activations = peaks["plain"] - 4 * parameter_bytes()
    assert peaks["activations"] - 4 * parameter_bytes() <= 0.15 * activations


@pytest.mark.slow
def test_the_full_stack_needs_a_sixth_of_the_plain_step(peaks: dict[str, int]) -> None:
    assert peaks["stack"] <= peaks["plain"] / 6


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", {"every": 2}], ids=["all kept", "recomputed"])
def test_auto_fills_the_device_and_does_not_overfill_it(simulated: Backend, checkpointing: Any) -> None:
    """A device with room for two thirds of what the whole model needs; more than that is an OutOfMemory."""
    way = {"memory": {"checkpointing": checkpointing}}
    whole, _ = memory_of_a_step(simulated, way)
    gc.collect()
    room = 2 * whole // 3
    MEMORY[0].limit_bytes = MEMORY[0].live_bytes + room
    peak, _ = memory_of_a_step(simulated, {"memory": {**way["memory"], "sharding": "parameters"}})
    assert 0.6 * room <= peak <= room


class Stored:
    """The contract's StateReader over what an engine exported."""

    def __init__(self, engine: Any) -> None:
        self.state = whole_state(engine)

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        return self.state.get((name, kind))


@pytest.mark.parametrize("precision", ["fp32", "bf16 weights"])
def test_a_run_goes_on_on_another_placement_as_if_nothing_had_been(
    simulated: Backend, precision: str
) -> None:
    """Two updates; then the state goes by name to layers on two devices and an optimizer on the CPU."""
    changes = {"precision": PRECISIONS[precision]}
    spec = spec_of({"memory": {"loss_chunk": 16}}, **changes)
    everything = {**WAYS["all"], "manual": {"devices": ["main", "sim:1"], "split": [2, 2]}}
    whole, moved = start(simulated, spec), start(simulated, spec_of(everything, **changes))
    for number in range(2):
        step(whole, spec, number)
    moved.import_state(Stored(whole))
    moved.restore_extras(whole.extras())
    for number in range(2, 4):
        step(whole, spec, number)
        step(moved, spec, number)
    found, expected = Stored(moved).state, Stored(whole).state
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7, msg=str(key))
    whole.close()
    moved.close()


class MaskedBlock(nn.Module):
    """Called as blocks of other libraries are: a mask by name, tables in a tuple, a tuple back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(
        self, hidden: torch.Tensor, *, mask: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, None]:
        return hidden + torch.tanh(self.layer(hidden * mask + tables[0]) * tables[1]), None


class MaskedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Embedding(257, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.blocks = nn.ModuleList(MaskedBlock() for _ in range(6))
        self.head = nn.Linear(8, 257)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(tokens)
        mask = (tokens > 3).unsqueeze(2).float()
        tables = hidden.detach().sin(), self.scale * 2  # the second one has a gradient
        for block in self.blocks:
            hidden, _ = block(hidden, mask=mask, tables=tables)
        return nn.functional.cross_entropy(
            self.head(hidden).flatten(0, 1), targets.flatten(), reduction="sum"
        )


class MaskedSource:
    description = "a test's"

    def build(self) -> nn.Module:
        return MaskedModel()

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return False


def test_what_every_block_is_called_with_is_copied_once_for_a_device_and_a_pass(simulated: Backend) -> None:
    """Hidden state, mask and two tables go over once, however many blocks are there; so do the gradients."""
    spec = spec_of({"manual": {"devices": ["main", "cpu"], "split": [2, 4]}})
    alone: Any = registry.load("cpu").start(
        registry.load("cpu").resolve(spec_of({}), 1), MaskedSource(), Job()
    )
    apart: Any = simulated.start(simulated.resolve(spec, 1), MaskedSource(), Job())
    for number in range(2):
        TRAFFIC.clear()
        step(alone, spec, number)
        step(apart, spec, number)
    out = TRAFFIC.copies["sim:0", "cpu"].count
    back = TRAFFIC.copies["cpu", "sim:0"].count
    clip_factor = norm = 1
    assert out == MICRO_BATCHES * (4 + 1) + clip_factor  # the gradient of the output
    assert back == MICRO_BATCHES * (1 + 2 + 2) + norm  # the output, two gradients, tokens and targets
    for (name, found), expected in zip(apart.model.named_parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-5, atol=1e-6, msg=name)
    apart.close()
    alone.close()
