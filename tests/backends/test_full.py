"""A full host is told like a full device, with what fills it and what to try, on every backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from backends.deepspeed.out_of_memory import watch_memory
from backends.full import full_place
from tests.backends.built_models import MORE_THAN_ANY_HOST_HAS
from tests.clean_process import start_module
from tests.jobs import ON_THE_CPU, job_environment
from xtrain import registry
from xtrain.contract import WHEN, OutOfMemory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
PLACES = [
    (MemoryError(), GPU, "cpu"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), GPU, "cpu"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), GPU, "cuda:1"),
    (RuntimeError("CUDA error: out of memory"), GPU, "cuda:1"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), torch.device("mps"), "mps"),
    (RuntimeError("Boolean value of Tensor with more than one value is ambiguous"), CPU, None),
]


@pytest.mark.parametrize(("error", "device", "place"), PLACES, ids=lambda value: str(value)[:40])
def test_what_is_full_is_known_from_the_error(
    error: Exception, device: torch.device, place: str | None
) -> None:
    assert full_place(error, device) == place


def test_what_torch_says_of_a_full_host_is_understood_under_deepspeed() -> None:
    held = {"parameters": [torch.zeros(5)]}
    with pytest.raises(OutOfMemory) as full, watch_memory(CPU, "step", lambda: held):
        torch.empty(MORE_THAN_ANY_HOST_HAS, dtype=torch.uint8)
    assert (full.value.device, full.value.memory.categories) == ("cpu", {"parameters": 20})


def test_another_error_is_left_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape"), watch_memory(CPU, "step", dict):
        raise RuntimeError("shape")


MOMENTS = {
    "greedy": (WHEN["step"], "  memory.checkpointing: auto ("),
    "large": (
        WHEN["start"],
        "  a smaller model\n",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "deepspeed"])
@pytest.mark.parametrize("factory", MOMENTS)
def test_a_run_on_a_full_host_ends_with_the_same_advice_on_every_backend(
    backend: str, factory: str, tmp_path: Path
) -> None:
    usable = registry.survey()[backend]
    if not usable.usable:
        pytest.skip(usable.reason)
    spec = {
        "model": {"factory": f"tests.backends.built_models:{factory}"},
        "data": {"source": "synthetic", "seq_len": 8, "tokens": 2000},
        "batch": {"global": 4},
        "train": {"steps": 2},
        "optimizer": {"lr": 0.1},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    said = tmp_path / "said"
    words: list[str | Path] = ["run", tmp_path / "spec.yaml", "--backend", backend, "--out", tmp_path / "out"]
    process = start_module("xtrain", *words, said=said, environ={**job_environment(1), **ON_THE_CPU})
    process.join()
    when, advice = MOMENTS[factory]
    assert process.exitcode == 1, said.read_text()
    assert f"error: cpu is out of memory {when}.\n" in said.read_text()
    assert advice in said.read_text()
    assert "Traceback" not in said.read_text()
