"""A cache of its own for every test, and specs with little in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xtrain.data import Dataset, open_data
from xtrain.spec.tree import Spec

Opener = Callable[..., Dataset]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XTRAIN_CACHE", str(folder))
    return folder


@pytest.fixture
def make_spec() -> Callable[..., Spec]:
    def make(
        *, batch: int = 8, micro: int = 2, seed: int = 1, model: dict[str, Any] | None = None, **data: Any
    ) -> Spec:
        return Spec.model_validate(
            {
                "model": model or {"preset": "gpt2-nano"},
                "data": {"source": "synthetic", "tokens": 2001, "seq_len": 10, **data},
                "batch": {"global": batch, "micro": micro},
                "train": {"steps": 10, "seed": seed},
                "optimizer": {"lr": 1e-3},
            }
        )

    return make


@pytest.fixture
def opened(make_spec: Callable[..., Spec]) -> Opener:
    """open_data of a spec with the given data keys; 200 sequences of 10 by default, 2 of them held out."""

    def open_with(**keys: Any) -> Dataset:
        return open_data(make_spec(**keys), show_progress=False)

    return open_with
