"""One process, on one device or with its layers over several: the training step written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    Moment,
    StateForm,
    StateKey,
    StatePiece,
    StateReader,
    StepInput,
    StepResult,
    StepValues,
    Trace,
)
from xtrain.measure.matmul import MatmulPeak
from xtrain.spec.tree import Spec
from xtrain.techniques.compiled import FirstStep, uncompiled

from ..batches import on_device
from ..step_counts import stored_counts
from ..yardstick import device_busy, matmul_peak
from . import state
from .activations import activations_on_host
from .assemble import assemble
from .clipping import global_norm, unscale_and_clip
from .devices import Cpu, Device
from .loss_scaling import LossScaler
from .optimizer import set_learning_rate
from .out_of_memory import memory_of, watch_memory
from .precision import autocast


class ManualEngine:
    """Implements xtrain.contract.Engine."""

    data_rank = 0
    data_size = 1

    def __init__(self, spec: Spec, source: ModelSource, devices: Sequence[Device]) -> None:
        """The first device is the home: batches, loss and norm are there. See assemble.py."""
        self.devices = list({device.torch_device: device for device in devices}.values())
        updates_on_host = spec.techniques.offload.optimizer.enabled
        for device in (*self.devices, *([Cpu()] if updates_on_host else [])):
            device.prepare()
        self.home = devices[0].torch_device
        self.asynchronous = any(device.asynchronous for device in devices)
        self.spec = spec
        self.clip = spec.train.clip
        self.precision = spec.precision
        self.scaler = LossScaler(spec.precision) if spec.precision.dtype == "fp16" else None
        self.threads = torch.get_num_threads()
        self.matmul_precision = torch.get_float32_matmul_precision()
        parts = assemble(spec, source, devices)
        self.model, self.weights, self.optimizer = parts.model, parts.weights, parts.optimizer
        self.in_backward = parts.in_backward
        self.notes = parts.notes
        self.parks_activations = spec.techniques.offload.activations.enabled
        self.parameter_count = sum(p.numel() for p in self.model.parameters())
        self.first_step = FirstStep(spec, first_rank=True)
        torch.manual_seed(spec.train.seed)  # dropout, from here on
        self.model.train()

    def train_step(self, step: StepInput, accept: Accept | None, trace: Trace) -> StepResult:
        scale = self.scaler.scale if self.scaler else None
        if self.in_backward:
            self.in_backward.lr = step.lr
        with self._watch_memory("step"), self.first_step.told():
            loss_sum = self._accumulate(step, scale or 1.0, trace)
        if self.in_backward:
            return StepResult(step.step, step.target_tokens, loss_sum, self.in_backward.norm())
        with self._watch_memory("update"), trace.span("optimizer"):
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
        loss_sum = torch.zeros((), device=self.home)
        for batch in step.micro_batches:
            with trace.span("forward"), self._autocast(), self._saved_tensors():
                loss = self.model(*on_device(batch, self.home))
            with trace.span("backward"), self._watch_memory("update" if self.in_backward else "step"):
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
        total = torch.zeros((), device=self.home)
        tokens = 0
        with torch.no_grad(), uncompiled(self.spec), self._watch_memory("evaluation"):
            for batch in batches:
                with self._autocast():
                    total += self.model(*on_device(batch, self.home))
                tokens += int((batch.targets != IGNORED_TARGET).sum())
        self.model.train()
        return LossSum(float(total), tokens)

    def fetch(self, results: Sequence[StepResult]) -> list[StepValues]:
        if not results:
            return []
        losses = torch.stack([torch.as_tensor(r.loss_sum) for r in results])
        norms = torch.stack([torch.as_tensor(r.grad_norm) for r in results])
        pairs = torch.stack([losses, norms.to(losses)]).tolist()
        return [
            StepValues(r.step, loss / r.target_tokens, norm, bool(r.skipped), r.loss_scale)
            for r, loss, norm in zip(results, *pairs, strict=True)
        ]

    def memory(self) -> Memory:
        """Of the home, also where layers are elsewhere."""
        return memory_of(self.devices[0], self.holdings())

    def holdings(self) -> Holdings:
        state = (value for kept in self.optimizer.state.values() for value in kept.values())
        return {
            "parameters": self.model.parameters(),
            "master": self.weights.masters(),
            "gradients": self.weights.held_gradients(),
            "optimizer": [value for value in state if isinstance(value, torch.Tensor)],
        }

    def state_layout(self) -> dict[StateKey, StateForm]:
        return state.state_layout(self.model, self.weights, self.optimizer)

    def export_state(self, owner: Callable[[str], int]) -> Iterator[StatePiece]:
        """One process: it owns everything, and every piece is a whole tensor."""
        return state.export_state(self.model, self.weights, self.optimizer)

    def import_state(self, reader: StateReader) -> None:
        with self._watch_memory("start"):
            state.import_state(self.model, self.weights, self.optimizer, reader)

    def extras(self) -> dict[str, JSON]:
        return {
            **state.step_counts(self.weights, self.optimizer).as_extras(),
            "loss_scaler": self.scaler.state() if self.scaler else None,
            "random": {key: text for one in self.devices for key, text in one.random_state().items()},
        }

    def restore_extras(self, extras: Mapping[str, Any]) -> None:
        state.set_step_counts(self.weights, self.optimizer, stored_counts(extras))
        if self.scaler and extras.get("loss_scaler"):
            self.scaler.restore(extras["loss_scaler"])
        for device in self.devices:
            device.set_random_state(extras.get("random") or {})

    def gather(self, value: JSON) -> list[JSON]:
        return [value]

    def any(self, flag: bool) -> bool:
        return flag

    def synchronize(self) -> None:
        for device in self.devices:
            device.synchronize()

    def matmul_peak(self) -> MatmulPeak | None:
        return matmul_peak(self.home, self.precision.dtype, self.synchronize)

    def device_busy(self) -> float | None:
        return device_busy(self.home)

    def close(self) -> None:
        self.weights.clear_gradients()

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self.precision, [device.torch_device for device in self.devices])

    def _saved_tensors(self) -> AbstractContextManager[None]:
        if not self.parks_activations:
            return nullcontext()
        return activations_on_host(self.model, keeps_strides=self.spec.train.compile)

    def _watch_memory(self, moment: Moment) -> AbstractContextManager[None]:
        return watch_memory(self.devices, moment, self.holdings)
