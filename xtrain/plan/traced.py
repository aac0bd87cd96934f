"""Any model's bytes: one micro-batch goes through it as fake tensors, which have shapes and no numbers.

What autograd would keep is put down to the block that was running, as the hand-written engine's own estimate
does (backends/manual/estimate.py), but nothing is computed and nothing allocated: a model of any size takes
seconds. Kernels are chosen as on a CPU; another device's attention may keep less.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xtrain.errors import RequestError, XtrainError, described
from xtrain.host_random import host_random_state, restore_host_random
from xtrain.models.adapter import HeadLoss
from xtrain.models.blocks import find_blocks
from xtrain.models.source import without_numbers
from xtrain.plan.model import FP32, ModelBytes, Widths
from xtrain.spec.tree import Spec
from xtrain.techniques.products import is_dear

DTYPES = {FP32: torch.float32, 2: torch.bfloat16}


class Tracer:
    """Traces the model of a spec, once for each size of micro-batch and precision.

    `model` is the tracer's own: its tensors are replaced by fake ones. RequestError where that does not work.
    """

    def __init__(self, spec: Spec, model: nn.Module, description: str = "") -> None:
        self.spec, self.model, self.description = spec, model.train(), description
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.blocks = find_blocks(model, spec.model.blocks, "xtrain plan")
        self.measured = lru_cache(maxsize=None)(self._measure)

    @classmethod
    def of(cls, spec: Spec) -> Tracer:
        """With the model made anew, without numbers."""
        with torch.device("meta"), _told(spec):
            model, description = without_numbers(spec)
        return cls(spec, model, description)

    def __call__(self, changed: Spec) -> ModelBytes:
        """For one micro-batch of a variation of the spec."""
        widths = Widths.of(changed.precision)
        return self.measured(changed.micro_batch, changed.data.seq_len, widths)

    def _measure(self, sequences: int, seq_len: int, widths: Widths) -> ModelBytes:
        with self.mode, _told(self.spec), _nothing_packed(), _nothing_drawn():
            _make_fake(self.model, DTYPES[widths.weight])
            kept = Kept(self.model, self.blocks)
            with kept.watched(), torch.autocast("cpu", torch.bfloat16) if widths.autocast else nullcontext():
                hidden, head = self._hidden(torch.zeros(sequences, seq_len, dtype=torch.int64))
            return self._model_bytes(kept, sequences * seq_len, widths, hidden, head)

    def _hidden(self, tokens: torch.Tensor) -> tuple[int, nn.Module | None]:
        """The width of what the head is given, and the head where the loss is taken in it by chunks."""
        if isinstance(self.model, HeadLoss):
            inner: Any = self.model.model
            state = inner.base_model(input_ids=tokens).last_hidden_state
            return int(state.shape[-1]), inner.get_submodule(self.model.head)
        output = self.model.model(tokens)  # type: ignore[operator]
        del output
        return 0, None

    def _model_bytes(
        self, kept: Kept, tokens: int, widths: Widths, hidden: int, head: nn.Module | None
    ) -> ModelBytes:
        count = len(self.blocks)
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        parameters = list(self.model.parameters())
        in_blocks = [p for p in parameters if id(p) in inside]
        table = max((p for p in parameters if id(p) not in inside and p.ndim == 2), key=lambda p: p.numel())
        projection: torch.Tensor = table if head is None else head.weight  # type: ignore[assignment]
        embeddings = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        matrices = sum(p.numel() for p in in_blocks if p.ndim >= 2)
        return ModelBytes(
            layers=count,
            hidden=hidden or int(projection.shape[1]),
            vocab_size=int(projection.shape[0]),
            tokens=tokens,
            widths=widths,
            parameters=sum(p.numel() for p in parameters),
            block_parameters=sum(p.numel() for p in in_blocks) // count,
            widest=max(p.numel() for p in in_blocks),
            tied=any(weight is projection for weight in embeddings),
            block=sum(kept.inside) // count,
            block_without_cheap=sum(kept.products) // count + tokens * hidden * widths.stream,
            products_beside=sum(kept.beside()) // count,
            views=sum(kept.views) // count,
            weight_copies=2 * matrices // count if widths.autocast else 0,
            expanded=kept.largest,
            head=kept.outside,
            whole_logits=head is None,
            gated=kept.gate == kept.largest,
        )


class Kept:
    """Bytes that autograd keeps in one pass: inside each block, and outside of all."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.inside, self.products, self.views = ([0] * len(blocks) for _ in range(3))
        """By block; also what matrix products and attention return, and what is a view of something kept."""
        self.returned: list[Any] = []
        """The storages of `products`."""
        self.outside = self.largest = self.gate = 0
        """The last two inside of a block: the largest that is kept, and the largest product of a gate."""
        self.running: int | None = None
        """The block whose forward pass this is."""
        own = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self.held: list[Any] = own
        """As long as they are, no other storage has the same number."""
        self.own = {storage._cdata for storage in own}
        self.seen: dict[int, set[Any]] = {}
        """The forms in which each storage was kept."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the pass, inside the mode that makes tensors fake."""
        hooks = []
        for place, block in enumerate(self.blocks):
            hooks.append(block.register_forward_pre_hook(partial(self._enter, place)))
            hooks.append(block.register_forward_hook(self._leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor), Products(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def beside(self) -> Iterator[int]:
        """Bytes of each product that autograd does not keep."""
        return (one.nbytes() for one in self.returned if one._cdata not in self.seen)

    def _enter(self, place: int, block: nn.Module, args: Any) -> None:
        self.running = place

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.running = None

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata in self.own:
            return tensor.detach()
        forms = self.seen.setdefault(storage._cdata, set())
        form = tensor.storage_offset(), tensor.shape, tensor.stride()
        if not forms:
            self.held.append(storage)
            self._add(storage.nbytes())
        elif form not in forms and tensor.nbytes == storage.nbytes() and self.running is not None:
            self.views[self.running] += tensor.nbytes
        forms.add(form)
        return tensor.detach()

    def _add(self, count: int) -> None:
        if self.running is None:
            self.outside += count
        else:
            self.inside[self.running] += count
            self.largest = max(self.largest, count)


class Products(TorchDispatchMode):
    """Adds up what dear operations return (xtrain/techniques/products.py), and finds gates."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = op(*args, **(kwargs or {}))
        if self.kept.running is not None and is_dear(op, args, kwargs or {}):
            made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            self.kept.products[self.kept.running] += sum(tensor.nbytes for tensor in made)
            self.kept.returned += [tensor.untyped_storage() for tensor in made]
        if self.kept.running is not None and _is_gate(op, args):
            self.kept.gate = max(self.kept.gate, output.nbytes)
        return output


def _is_gate(op: Any, args: Any) -> bool:
    """Whether two tensors of one shape are multiplied, each of which has a gradient."""
    if op is not torch.ops.aten.mul.Tensor:
        return False
    left, right = args
    return isinstance(right, torch.Tensor) and left is not right and left.shape == right.shape


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Every tensor of a model anew, on a CPU that is none; tied parameters stay one."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None:
                    slots[name] = made.setdefault(id(tensor), _like(tensor, dtype))  # type: ignore[assignment]


def _like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kept = dtype if tensor.is_floating_point() else tensor.dtype
    new = torch.empty(tensor.shape, dtype=kept, device="cpu")
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


@contextmanager
def _nothing_packed() -> Iterator[None]:
    """The transformers library looks at numbers to see whether sequences were packed; ours never are.

    Where it cannot look it makes a mask for the case that they are, which no run has.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    find = getattr(masking, "find_packed_sequence_indices", None)
    if find is None:
        yield
        return
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = find


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Whatever a model draws in between, for dropped layers say, a training draws the same numbers after."""
    state = host_random_state()
    with torch.random.fork_rng(devices=[]):
        yield
    restore_host_random(state)


@contextmanager
def _told(spec: Spec) -> Iterator[None]:
    """Whatever a model cannot do without numbers is told as a message."""
    try:
        yield
    except Exception as error:
        name = spec.model.factory or spec.model.hf
        why = str(error) if isinstance(error, XtrainError) else described(error)
        raise RequestError(
            f"xtrain plan: the model {name} cannot be made without numbers: {why}; "
            "--formula estimates any size"
        ) from error
