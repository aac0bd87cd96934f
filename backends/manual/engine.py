"""One process, one device: the training step written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from xtrain.contract import (
    IGNORED_TARGET,
    JSON,
    Accept,
    Batch,
    Holdings,
    LossSum,
    Memory,
    ModelSource,
    OutOfMemory,
    StateReader,
    StateTensor,
    StepInput,
    StepResult,
    StepValues,
    Trace,
)
from xtrain.ledger import count_bytes
from xtrain.spec.tree import Spec

from . import state
from .clipping import global_norm, unscale_and_clip
from .devices import Device
from .loss_scaling import LossScaler
from .optimizer import build_optimizer, set_learning_rate
from .precision import autocast, hold_weights


class ManualEngine:
    """Implements xtrain.contract.Engine."""

    data_rank = 0
    data_size = 1

    def __init__(self, spec: Spec, source: ModelSource, device: Device) -> None:
        device.prepare()
        self.device = device
        self.asynchronous = device.asynchronous
        self.clip = spec.train.clip
        self.precision = spec.precision
        self.scaler = LossScaler(spec.precision) if spec.precision.dtype == "fp16" else None
        self.threads = torch.get_num_threads()
        self.matmul_precision = torch.get_float32_matmul_precision()
        self.model = source.build().to(device.torch_device)
        self.weights = hold_weights(self.model, spec.precision)
        self.parameter_count = sum(p.numel() for p in self.model.parameters())
        self.optimizer = build_optimizer(spec.optimizer, self.weights.updated, source, device.fused_optimizer)
        torch.manual_seed(spec.train.seed)  # dropout, from here on
        self.model.train()

    def train_step(self, step: StepInput, accept: Accept | None, trace: Trace) -> StepResult:
        scale = self.scaler.scale if self.scaler else None
        with self._watch_memory(before_update=True):
            loss_sum = self._accumulate(step, scale or 1.0, trace)
        with self._watch_memory(before_update=False), trace.span("optimizer"):
            gradients = self.weights.gradients()
            norm = global_norm(gradients) / (scale or 1.0)
            skipped = self._overflowed(norm) or not (
                accept is None or accept(float(loss_sum) / step.target_tokens, float(norm))
            )
            if not skipped:
                unscale_and_clip(gradients, norm, scale, self.clip)
                set_learning_rate(self.optimizer, step.lr)
                self.optimizer.step()
                self.weights.publish()
            self.weights.clear_gradients()
        return StepResult(step.step, step.target_tokens, loss_sum, norm, skipped, scale)

    def _accumulate(self, step: StepInput, scale: float, trace: Trace) -> torch.Tensor:
        """Forward and backward of every micro-batch; returns the sum of token losses.

        Each micro-batch's loss is divided by the tokens of the *whole* batch, so that the sum of
        their gradients is the gradient of the one mean, however unequal the micro-batches are.
        """
        loss_sum = torch.zeros((), device=self.device.torch_device)
        for batch in step.micro_batches:
            with trace.span("forward"), autocast(self.precision, self.device.torch_device):
                loss = self.model(*self._to_device(batch))
            with trace.span("backward"):
                (loss * (scale / step.target_tokens)).backward()
            loss_sum += loss.detach()
        return loss_sum

    def _overflowed(self, norm: torch.Tensor) -> bool:
        """Under a loss scale: whether any gradient is inf or NaN. The scaler is told."""
        if self.scaler is None:
            return False
        overflow = not bool(torch.isfinite(norm))
        self.scaler.update(overflow)
        return overflow

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        self.model.eval()
        total = torch.zeros((), device=self.device.torch_device)
        tokens = 0
        with torch.no_grad():
            for batch in batches:
                with autocast(self.precision, self.device.torch_device):
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
        categories = count_bytes(self.holdings()).get(str(self.device.torch_device), {})
        return Memory(self.device.live(), self.device.reserved(), categories)

    def holdings(self) -> Holdings:
        weights = (*self.weights.trained.values(), *self.weights.updated.values())
        state = (value for kept in self.optimizer.state.values() for value in kept.values())
        return {
            "parameters": self.model.parameters(),
            "master": self.weights.masters(),
            "gradients": [p.grad for p in weights if p.grad is not None],
            "optimizer": [value for value in state if isinstance(value, torch.Tensor)],
        }

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return state.state_shapes(self.model)

    def export_state(self, owner: Callable[[str], int]) -> Iterator[StateTensor]:
        return state.export_state(self.model, self.weights, self.optimizer, owner)

    def import_state(self, reader: StateReader) -> None:
        state.import_state(self.model, self.weights, self.optimizer, reader)

    def extras(self) -> dict[str, JSON]:
        return {
            "optimizer_steps": state.optimizer_steps(self.optimizer),
            "loss_scaler": self.scaler.state() if self.scaler else None,
            "random": self.device.random_state(),
        }

    def restore_extras(self, extras: Mapping[str, Any]) -> None:
        state.set_optimizer_steps(self.optimizer, int(extras["optimizer_steps"]))
        if self.scaler and extras.get("loss_scaler"):
            self.scaler.restore(extras["loss_scaler"])
        self.device.set_random_state(extras.get("random") or {})

    def gather(self, value: JSON) -> list[JSON]:
        return [value]

    def any(self, flag: bool) -> bool:
        return flag

    def synchronize(self) -> None:
        self.device.synchronize()

    def close(self) -> None:
        self.weights.clear_gradients()

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
