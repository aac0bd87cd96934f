"""A valid spec that is as short as one can be, with what a test sets in it."""

from __future__ import annotations

from typing import Any

from xtrain.spec.tree import Spec

SMALL: dict[str, Any] = {
    "model": {"preset": "gpt2-nano"},
    "data": {"source": "synthetic"},
    "batch": {"global": 8, "micro": 2},
    "train": {"steps": 10},
    "optimizer": {"lr": 1e-3},
}


def make_spec(**sections: Any) -> Spec:
    """Sections replace those of SMALL as wholes."""
    return Spec.model_validate({**SMALL, **sections})
