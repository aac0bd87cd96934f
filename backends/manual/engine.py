"""One process, one device: the training step written out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from xtrain.contract import (
    IGNORED_TARGET,
    JSON,
    Accept,
    Batch,
    LossSum,
    Memory,
    ModelSource,
    OutOfMemory,
    StepInput,
    StepResult,
    StepValues,
    Trace,
)
from xtrain.spec.tree import Spec

from .clipping import global_norm, scale_to_norm
from .devices import Device
from .optimizer import build_optimizer, set_learning_rate

AUTOCAST_DTYPES = {"bf16": torch.bfloat16}


class ManualEngine:
    """Implements xtrain.contract.Engine."""

    data_rank = 0
    data_size = 1

    def __init__(self, spec: Spec, source: ModelSource, device: Device) -> None:
        self.device = device
        self.asynchronous = device.asynchronous
        self.clip = spec.train.clip
        self.autocast_dtype = AUTOCAST_DTYPES.get(spec.precision.dtype)
        self.model = source.build().to(device.torch_device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.parameter_count = sum(p.numel() for p in self.model.parameters())
        self.optimizer = build_optimizer(spec.optimizer, self.model, source, device.fused_optimizer)
        torch.manual_seed(spec.train.seed)  # dropout, from here on
        self.model.train()

    def train_step(self, step: StepInput, accept: Accept | None, trace: Trace) -> StepResult:
        """Accumulate over the micro-batches, clip, update.

        Each micro-batch's loss is divided by the tokens of the *whole* batch, so that the sum of
        their gradients is the gradient of the one mean, however unequal the micro-batches are.
        """
        with self._watch_memory(before_update=True):
            loss_sum = torch.zeros((), device=self.device.torch_device)
            for batch in step.micro_batches:
                with trace.span("forward"), self._autocast():
                    loss = self.model(*self._to_device(batch))
                with trace.span("backward"):
                    (loss / step.target_tokens).backward()
                loss_sum += loss.detach()
        with self._watch_memory(before_update=False), trace.span("optimizer"):
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = global_norm(gradients)
            if self.clip is not None:
                scale_to_norm(gradients, norm, self.clip)
            accepted = accept is None or accept(float(loss_sum) / step.target_tokens, float(norm))
            if accepted:
                set_learning_rate(self.optimizer, step.lr)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return StepResult(step.step, step.target_tokens, loss_sum, norm, skipped=not accepted)

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        self.model.eval()
        total = torch.zeros((), device=self.device.torch_device)
        tokens = 0
        with torch.no_grad():
            for batch in batches:
                with self._autocast():
                    total += self.model(*self._to_device(batch))
                tokens += int((batch.targets != IGNORED_TARGET).sum())
        self.model.train()
        return LossSum(float(total), tokens)

    def fetch(self, results: Sequence[StepResult]) -> list[StepValues]:
        if not results:
            return []
        losses = torch.stack([torch.as_tensor(r.loss_sum) for r in results])
        norms = torch.stack([torch.as_tensor(r.grad_norm) for r in results])
        pairs = torch.stack([losses, norms.to(losses.dtype)]).tolist()
        return [
            StepValues(r.step, loss / r.target_tokens, norm, bool(r.skipped), r.loss_scale)
            for r, loss, norm in zip(results, *pairs, strict=True)
        ]

    def memory(self) -> Memory:
        categories = {
            "parameters": sum(_bytes(p) for p in self.model.parameters()),
            "gradients": sum(_bytes(p.grad) for p in self.parameters if p.grad is not None),
            "optimizer": sum(
                _bytes(value)
                for state in self.optimizer.state.values()
                for value in state.values()
                if isinstance(value, torch.Tensor)
            ),
        }
        return Memory(self.device.live(), self.device.reserved(), categories)

    def gather(self, value: JSON) -> list[JSON]:
        return [value]

    def synchronize(self) -> None:
        self.device.synchronize()

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> AbstractContextManager[object]:
        """Matrix products in 16 bit, sums and norms in fp32, weights untouched."""
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.torch_device.type, self.autocast_dtype, enabled=enabled)

    def _to_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        target = self.device.torch_device
        tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
        return tokens.to(target, non_blocking=True), targets.to(target, non_blocking=True)

    @contextmanager
    def _watch_memory(self, before_update: bool) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not self.device.is_out_of_memory(error):
                raise
            raise OutOfMemory(str(self.device.torch_device), self.memory(), before_update) from error


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
