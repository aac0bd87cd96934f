"""Python's and NumPy's global random generators: models with code of their own may draw from them.

torch's belong to the engines. The states are plain JSON, for a checkpoint's state.json.
"""

from __future__ import annotations

import base64
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from xtrain.contract import JSON

_TWISTER = "MT19937"
"""Python's generator, and NumPy's unless someone exchanged it; the state has so many 32-bit words."""
_WORDS = 624
_PYTHON_VERSION = 3
"""Of what random.getstate returns."""


def seed_host(seed: int) -> None:
    """Set both; any seed of a spec will do."""
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])


def host_random_state() -> dict[str, JSON]:
    """Both states. NumPy's is left out where its global generator is of another kind."""
    _, words, gauss = random.getstate()
    state: dict[str, JSON] = {"python": {"words": _encoded(words), "gauss": gauss}}
    numpy: Any = np.random.get_state(legacy=False)
    if numpy["bit_generator"] == _TWISTER:
        state["numpy"] = {
            "words": _encoded(numpy["state"]["key"]),
            "position": int(numpy["state"]["pos"]),
            "gauss": float(numpy["gauss"]) if numpy["has_gauss"] else None,
        }
    return state


def restore_host_random(state: Mapping[str, Any]) -> None:
    """The inverse. KeyError, TypeError or ValueError where it is none; what is not in it stays as it is."""
    if python := state.get("python"):
        words = _decoded(python["words"], _WORDS + 1)  # the last one is the position
        random.setstate((_PYTHON_VERSION, tuple(words.tolist()), _gauss(python["gauss"])))
    if numpy := state.get("numpy"):
        position, gauss = numpy["position"], _gauss(numpy["gauss"])
        if type(position) is not int or not 0 <= position <= _WORDS:
            raise ValueError(f"position {position!r} of NumPy's generator, expected 0 to {_WORDS}")
        words = _decoded(numpy["words"], _WORDS)
        np.random.set_state((_TWISTER, words, position, int(gauss is not None), gauss or 0.0))


def _encoded(words: Any) -> str:
    return base64.b64encode(np.asarray(words, dtype="<u4").tobytes()).decode("ascii")


def _decoded(text: str, count: int) -> np.ndarray:
    found = np.frombuffer(base64.b64decode(text, validate=True), dtype="<u4").astype(np.uint32)
    if len(found) != count:
        raise ValueError(f"a generator of {len(found)} words, expected {count}")
    return found


def _gauss(value: Any) -> float | None:
    """The second half of a pair of normal draws, where one is kept."""
    if value is not None and not (isinstance(value, float) and math.isfinite(value)):
        raise ValueError(f"gauss {value!r} of a generator, expected a finite number or null")
    return value
