"""A model's own code builds it, and no process holds more of it than its share and about one parameter.

All processes of a job run that code alike, on the same numbers. So a parameter need not be whole all the
time: between two uses each process keeps its share of the bytes, and a use puts them together again. A torch
function mode sees what uses a parameter, whatever the code computes with it; weights that it draws at the
end, after all modules were made, are drawn as ever, and are the same bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

NEED_NO_NUMBERS = frozenset(
    {"__get__", "__len__", "__set__", "dim", "element_size", "is_contiguous", "is_floating_point"}
    | {"detach", "ndimension", "nelement", "numel", "requires_grad_", "size", "stride"}
)
HAND_OUT_MEMORY = frozenset(
    {"__array__", "__dlpack__", "data_ptr", "numpy", "share_memory_", "storage", "untyped_storage"}
)
"""What they were asked of stays whole: it may be read and written without torch from now on."""
COPY = frozenset({"__deepcopy__", "clone"})
"""A copy of a parameter is mostly a parameter to be: nn.TransformerEncoder makes its layers so."""
GRADIENTS = frozenset({"backward", "grad"})
"""They read what a forward pass kept, out of a torch function mode's sight."""
DONE, FAILED = -1, -2


class CannotCut(BaseException):
    """The model has to be built whole; says why. No Exception: code around a constructor catches those."""


@dataclass
class _Part:
    """One storage of parameters."""

    storage: Callable[[], torch.UntypedStorage | None]
    """None when the model's code has dropped it."""
    bytes: int
    share: torch.Tensor | None = None
    """This process's bytes of it, uint8, while it is not whole."""


class Cutter(TorchFunctionMode):
    """Every parameter that is registered while this is entered is cut up over the ranks of `group`.

    What is whole at one time, beyond what a call takes, is no more than the largest parameter. Entering and
    leaving is collective; CannotCut is raised on all ranks alike.
    """

    def __init__(self, rank: int, world: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self._rank, self._world, self._group = rank, world, group
        self._parts: list[_Part] = []
        self._known: dict[int, int] = {}
        """Storage -> its number in `_parts`; the ranks count alike, whatever their addresses."""
        self._whole: dict[int, None] = {}
        """Numbers of the parts that are whole, or were when they were dropped; used longest ago first."""
        self._room = 0
        """Bytes of the largest part so far."""

    @contextmanager
    def building(self) -> Iterator[None]:
        """Around the model's code."""
        hook = register_module_parameter_registration_hook(lambda module, name, one: self._adopt(one))
        try:
            with self:
                yield
            self._agree(DONE)
        except CannotCut:
            raise
        except BaseException:
            with suppress(CannotCut, RuntimeError):  # the others learn that this one is out
                self._agree(FAILED)
            raise
        finally:
            hook.remove()

    def whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """Its numbers, put together where they are not. Collective."""
        self._use([parameter])
        return parameter.data

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in GRADIENTS:
            raise CannotCut("its code computes gradients while it builds the model")
        if name in NEED_NO_NUMBERS:
            result = func(*args, **(kwargs or {}))
            if name == "__set__" and isinstance(args[0], nn.Parameter):  # parameter.data = ...
                self._adopt(args[0])
            return result
        used = self._use(tree_leaves((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        if used and name in COPY:
            self._adopt(result)
        if name in HAND_OUT_MEMORY:
            for number in used:
                self._whole.pop(number, None)  # so that it is never chosen to be cut up
        return result

    def _adopt(self, tensor: torch.Tensor) -> None:
        """From now on only a share of it stays, where its memory is its own to give up."""
        with torch._C.DisableTorchFunction():
            storage = _storage_of(tensor)
            if storage is None or storage.device.type != "cpu" or storage._cdata in self._known:
                return
            if not storage.resizable() or not storage.nbytes():
                return
            number, key = len(self._parts), storage._cdata
            self._parts.append(_Part(weakref.ref(storage), storage.nbytes()))
            self._known[key] = number
            weakref.finalize(storage, self._forget, key, number)
            self._room = max(self._room, storage.nbytes())
            self._whole[number] = None
            self._make_room([number])

    def _forget(self, key: int, number: int) -> None:
        """Dropped: at no moment that all ranks agree on, so what decides on cutting stays as it is."""
        self._parts[number].share = None
        del self._known[key]

    def _use(self, values: Iterable[Any]) -> Collection[int]:
        """Make whole what is known of them; returns its numbers."""
        with torch._C.DisableTorchFunction():
            storages = [_storage_of(value) for value in values if isinstance(value, torch.Tensor)]
            known = [self._known.get(storage._cdata) for storage in storages if storage is not None]
            used = dict.fromkeys(number for number in known if number is not None)
            away = [number for number in used if self._parts[number].share is not None]
            for number in used:
                if number in self._whole:
                    self._whole[number] = self._whole.pop(number)
            self._make_room(used, sum(self._parts[number].bytes for number in away))
            for number in away:
                self._put_together(number)
                self._whole[number] = None
        return used

    def _make_room(self, in_use: Collection[int], more_bytes: int = 0) -> None:
        """Cut up what was used longest ago, until there is room for `more_bytes`."""
        whole_bytes = sum(self._parts[number].bytes for number in self._whole)
        for number in [number for number in self._whole if number not in in_use]:
            if whole_bytes + more_bytes <= self._room:
                break
            self._cut(number)
            del self._whole[number]
            whole_bytes -= self._parts[number].bytes

    def _cut(self, number: int) -> None:
        part = self._parts[number]
        storage = part.storage()
        if storage is None:
            return
        length = self._share_bytes(part)
        own = _bytes_of(storage)[: part.bytes][self._rank * length :][:length]
        part.share = torch.zeros(length, dtype=torch.uint8)
        part.share[: len(own)] = own
        del own
        storage.resize_(0)

    def _put_together(self, number: int) -> None:
        part = self._parts[number]
        storage = part.storage()
        if storage is None or part.share is None:
            return
        self._agree(number)
        storage.resize_(self._world * self._share_bytes(part))
        dist.all_gather_into_tensor(_bytes_of(storage), part.share, self._group)
        part.share = None

    def _share_bytes(self, part: _Part) -> int:
        return -(-part.bytes // self._world)

    def _agree(self, number: int) -> None:
        """CannotCut where another rank is at another place in the model's code."""
        said = torch.empty(self._world, dtype=torch.int64)
        dist.all_gather_into_tensor(said, torch.tensor([number]), self._group)
        if set(said.tolist()) != {number}:
            raise CannotCut("its code does not do the same on every process")


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """None where the layout has none, or nothing was made yet."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """uint8 [bytes], the storage's own memory."""
    return torch.empty(0, dtype=torch.uint8).set_(storage)
