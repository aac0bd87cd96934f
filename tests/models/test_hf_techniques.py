"""Memory techniques on models of the transformers library: they change nothing.

Masks are picked by the loop's index (Gemma, Qwen-2), rotary tables are passed beside the hidden state: blocks
must stay where they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.worker import Collector
from tests.models.families import FAMILIES, VOCABULARY, write_config
from xtrain import registry
from xtrain.contract import Job
from xtrain.data import open_data
from xtrain.errors import RequestError
from xtrain.loop import Loop
from xtrain.models.blocks import find_blocks
from xtrain.models.source import model_source
from xtrain.schedule import learning_rate
from xtrain.spec.tree import Spec
from xtrain.techniques.checkpointing import checkpoint_activations

pytestmark = pytest.mark.slow  # importing transformers takes seconds

LAYERS = 4
GROUPINGS: list[dict[str, Any]] = [{"every": 1}, {"every": 3}, {"selective": {"ops": "cheap"}}]


def spec_of(folder: Path, checkpointing: Any, **model: Any) -> Spec:
    return Spec.model_validate(
        {
            "model": {"hf": str(folder), **model},
            "data": {"source": "synthetic", "seq_len": 32, "tokens": 5000},
            "batch": {"global": 4, "micro": 2},
            "train": {"steps": 3},
            "optimizer": {"lr": 0.1},
            "memory": {"checkpointing": checkpointing},
        }
    )


class Step:
    """One forward and backward pass: loss, gradients, and the elements that were kept in between."""

    def __init__(self, spec: Spec) -> None:
        model = model_source(spec, VOCABULARY).build()
        checkpoint_activations(model, spec)
        torch.manual_seed(0)
        tokens, targets = torch.randint(0, VOCABULARY, (2, 3, 32))
        self.kept = 0
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            loss = model(tokens, targets)
        loss.backward()
        self.loss = loss.detach()
        self.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept += tensor.numel()
        return tensor


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_blocks_give_the_same_loss_and_gradients_and_keep_less(
    family: str, dropout: float, tmp_path: Path
) -> None:
    folder = write_config(tmp_path, family)
    plain = Step(spec_of(folder, "none", dropout=dropout))
    for grouping in GROUPINGS:
        step = Step(spec_of(folder, grouping, dropout=dropout))
        assert torch.equal(step.loss, plain.loss)
        assert set(step.gradients) == set(plain.gradients)
        assert all(torch.equal(step.gradients[name], g) for name, g in plain.gradients.items())
        assert step.kept < plain.kept / 5


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_and_can_be_named_as_the_model_names_them(family: str, tmp_path: Path) -> None:
    model: Any = model_source(spec_of(write_config(tmp_path, family), "none"), VOCABULARY).build()
    blocks = find_blocks(model, None)
    paths = {id(module): path for path, module in model.model.named_modules()}
    list_path = paths[id(blocks[0])].removesuffix(".0")
    assert len(blocks) == LAYERS
    assert [paths[id(block)] for block in blocks] == [f"{list_path}.{n}" for n in range(LAYERS)]
    assert find_blocks(model, list_path) == blocks


def losses(spec: Spec) -> list[float | None]:
    """Of a few updates on the hand-written engine."""
    data = open_data(spec, show_progress=False)
    backend = registry.load("cpu")
    assert backend.problems(spec, 1) == []
    engine = backend.start(backend.resolve(spec, 1), model_source(spec, data.vocab_size), Job())
    collector = Collector()
    Loop(engine, data, learning_rate(spec), collector, 7).run(0, spec.train.steps)
    engine.close()
    return [record.loss for record in collector.records]


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_layers_over_devices_recomputed_and_offloaded_train_the_same(family: str, tmp_path: Path) -> None:
    """Two places on one device: the split itself, through the engine, with everything else on."""
    folder = write_config(tmp_path, family)
    plain, spec = spec_of(folder, "none"), spec_of(folder, {"every": 2})
    offload = {"optimizer": {"device": "cpu"}, "gradients": {"device": "cpu"}}
    tree = spec.model_dump(by_alias=True)
    tree["manual"] = {"devices": ["cpu", "cpu"], "split": [1, 3]}
    tree["memory"]["offload"] |= offload
    assert losses(Spec.model_validate(tree)) == losses(plain)


def test_a_model_whose_blocks_are_not_found_says_so_and_is_built(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "llama")
    source = model_source(spec_of(folder, "none", blocks="model.none"), VOCABULARY)
    source.build()
    assert any("its blocks cannot be found" in note for note in source.notes)


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    spec = spec_of(write_config(tmp_path, "llama"), {"every": 1}, blocks="model.blocks")
    with pytest.raises(
        RequestError, match=r"model.blocks: found model.blocks, .* this model has model.layers"
    ):
        Step(spec)
