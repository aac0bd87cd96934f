"""Where the blocks of a model are."""

from __future__ import annotations

import pytest
from torch import nn

from xtrain.errors import RequestError
from xtrain.models.adapter import LogitsLoss
from xtrain.models.blocks import find_blocks


class Experts(nn.Module):
    """A layer with more experts than there are layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(16))


class Model(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Embedding(8, 2), nn.Dropout())
        self.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(2))
        self.decoder = nn.Module()
        self.decoder.layers = layers


def layers(number: int = 3) -> nn.ModuleList:
    return nn.ModuleList(Experts() for _ in range(number))


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_the_longest_outermost_list_of_one_type_is_found(kind: type[nn.Module]) -> None:
    made = list(layers())
    expected = kind(made) if kind is nn.ModuleList else kind(*made)
    assert find_blocks(Model(expected), None) == made


def test_the_path_names_another_list() -> None:
    model = Model(layers())
    assert len(find_blocks(model, "norms")) == 2
    found = find_blocks(model, "decoder.layers.1.experts")
    assert found == list(model.get_submodule("decoder.layers.1.experts").children())


def test_the_path_is_that_of_the_users_own_code() -> None:
    made = layers()
    assert find_blocks(LogitsLoss(Model(made), "here"), "decoder.layers") == list(made)


def message(model: nn.Module, path: str | None) -> str:
    with pytest.raises(RequestError) as caught:
        find_blocks(model, path)
    return str(caught.value)


def test_a_model_without_a_list_is_refused_with_what_to_do() -> None:
    mixed = nn.Sequential(nn.Embedding(8, 2), nn.Linear(2, 2), nn.ReLU())
    for model in (nn.Linear(2, 2), LogitsLoss(mixed, "here"), nn.Sequential(nn.ModuleList([nn.ReLU()]))):
        assert message(model, None) == (
            "memory.checkpointing: the blocks of this model cannot be found: expected an nn.ModuleList or "
            "nn.Sequential of modules of one type; name it in model.blocks, or do without "
            "memory.checkpointing"
        )


def test_a_path_that_leads_nowhere_is_refused_with_the_lists_there_are() -> None:
    assert message(Model(nn.ModuleList([nn.Linear(2, 2)])), "decoder.blocks") == (
        "model.blocks: found decoder.blocks, expected the path of an nn.ModuleList or nn.Sequential; "
        "this model has decoder.layers, norms, stem"
    )
    assert message(nn.Linear(2, 2), "layers") == (
        "model.blocks: found layers, expected the path of an nn.ModuleList or nn.Sequential; "
        "this model has none"
    )


def test_a_path_to_something_else_is_refused() -> None:
    assert message(Model(layers(1)), "decoder") == (
        "model.blocks: found decoder, a Module, expected the path of an nn.ModuleList or nn.Sequential; "
        "this model has decoder.layers, decoder.layers.0.experts, norms, stem"
    )
