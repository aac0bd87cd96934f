"""What stands in a file that somebody else wrote: taken out if it is what was expected, else named."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xtrain.errors import RequestError
from xtrain.printable import printable

if TYPE_CHECKING:
    import torch

SHOWN = 60
"""Characters of a value in a message."""
LARGEST = 1e12
"""Of updates and elements."""
_NAMED = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Found:
    """A value and its place. RequestError has the file, the place, what was found and what was expected."""

    value: Any
    file: str
    place: str = ""

    def at(self, key: str | int) -> Found:
        """Below a mapping or a sequence; None where there is no such thing in it."""
        below: Any
        if isinstance(self.value, Mapping):
            below = self.value.get(key)
        elif isinstance(self.value, list | tuple) and isinstance(key, int):
            below = self.value[key] if 0 <= key < len(self.value) else None
        else:
            raise self.refused("a mapping" if isinstance(key, str) else "a list or a mapping")
        return Found(below, self.file, f"{self.place}.{key}" if self.place else str(key))

    def items(self) -> Iterator[tuple[str, Found]]:
        """Of a mapping by name."""
        if not isinstance(self.value, Mapping):
            raise self.refused("a mapping")
        for key in self.value:
            if not isinstance(key, str):
                raise self.refused(f"names as its keys, not {_shown(key)}")
            yield key, self.at(key)

    def numbered(self) -> list[Found]:
        """Of a list."""
        if not isinstance(self.value, list | tuple):
            raise self.refused("a list")
        return [self.at(number) for number in range(len(self.value))]

    def count(self) -> int:
        """A whole number from 0 on, also as a number with a point or in a tensor."""
        number = self.number()
        if not 0 <= number <= LARGEST or number != int(number):
            raise self.refused("a whole number from 0 on")
        return int(number)

    def number(self) -> float:
        import torch

        value = self.value
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
        if isinstance(value, bool) or not finite:
            raise self.refused("a number")
        return float(value)

    def tensor(self) -> torch.Tensor:
        """Whose bytes are all in the file: one that repeats itself could be of any size."""
        import torch

        value = self.value
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise self.refused("a plain tensor")
        held = value.untyped_storage().nbytes()
        if value.is_complex() or value.is_quantized or value.numel() * value.element_size() > held:
            raise self.refused("a plain tensor")
        return value

    def slice(self, begin: int, numel: int) -> torch.Tensor:
        """Of a flat tensor."""
        flat = self.tensor()
        if flat.ndim != 1 or begin + numel > flat.numel():
            raise self.refused(f"a flat tensor of {begin + numel} elements or more")
        return flat[begin : begin + numel]

    def refused(self, expected: str) -> RequestError:
        place = f"{self.place}: " if self.place else ""
        found = f"found {_shown(self.value)}, expected {expected}"
        return RequestError(printable(f"{self.file}: {place}{found}; it is not as DeepSpeed writes it"))


def _shown(value: Any) -> str:
    import torch

    if value is None:
        return "nothing"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)[:SHOWN] if isinstance(value, _NAMED) else f"a {type(value).__name__}"
