"""Files that torch.save wrote, read as data: nothing in them is run.

torch's own unpickler for `weights_only=True` makes tensors, numbers, text and containers. What DeepSpeed
puts in beside these is on a list here, and becomes something inert; a file with anything else is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtrain.errors import RequestError
from xtrain.printable import printable


class Inert:
    """Stands for an object of DeepSpeed's: its attributes, and none of its methods."""


class LossScale(Inert):
    """Of a fixed loss scale."""


class DynamicLossScale(Inert):
    """Of one that grows and shrinks."""


class Fragment(Inert):
    """Where a parameter lies in a rank's flat piece: `start` and `numel`."""


ALLOWED: dict[str, Callable[..., Any]] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScale,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": DynamicLossScale,
    "deepspeed.utils.tensor_fragment.fragment_address": Fragment,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
}
"""By the name that stands in the file. LossScaler is DeepSpeed's own, of 0.19.8 as the others."""


def load(file: Path) -> Any:
    """The content, its tensors mapped from the disk; RequestError says what is wrong with it."""
    import torch

    if not file.is_file():  # a pipe would be waited for without end
        raise RequestError(
            f"{file}: found a folder, a pipe or a broken link, expected a file of torch.save's"
        )
    allowed: list[Any] = [(stand_in, name) for name, stand_in in ALLOWED.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        first = str(error).split("\n")[0].strip()
        raise RequestError(
            f"{file} is refused: it holds more than tensors, numbers and what DeepSpeed puts beside them "
            f"({', '.join(sorted(ALLOWED))}). Reading it could run code that is in it. torch says: {first}"
        ) from None
    except Exception as error:  # whatever a pickle makes torch's reader stumble over
        reason = str(error).split("\n")[0] or type(error).__name__
        raise RequestError(printable(f"{file} cannot be read: {reason}")) from None
