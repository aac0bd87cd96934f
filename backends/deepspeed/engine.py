"""DeepSpeed does the work; this says what the work is, and cancels what it would divide by on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist

from xtrain.allocator import keep_freed_memory
from xtrain.contract import (
    IGNORED_TARGET,
    JSON,
    Accept,
    Batch,
    Holdings,
    Job,
    LossSum,
    Memory,
    ModelSource,
    Moment,
    Resolved,
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
from xtrain.techniques.checkpointing import checkpoint_activations
from xtrain.techniques.compiled import FirstStep, compile_model, uncompiled

from ..batches import on_device
from ..host_attention import quicken_attention
from ..step_counts import stored_counts
from ..yardstick import device_busy, matmul_peak
from . import state
from .built_sizes import UNSIZED, built_sizes, completed, sized
from .communication import communication_traced
from .construct import bound_gathering, build
from .drive import Drive
from .environment import collective_timeout, device_of, start_process_group
from .fp16 import require_fp16
from .holdings import holdings
from .loss_scaling import DeferredGrowth
from .norm import clip_replicated
from .optimizer import build_optimizer
from .out_of_memory import memory_of, watch_memory
from .random import random_state, set_random_state
from .saved import keeping
from .shards import Shards, shards_of
from .votes import Votes
from .zero import stage_of


class DeepSpeedEngine:
    """Implements xtrain.contract.Engine and DecidesLater on a deepspeed.DeepSpeedEngine."""

    def __init__(self, resolved: Resolved, source: ModelSource, job: Job) -> None:
        import deepspeed

        spec = resolved.spec
        self.spec = spec
        self.stage = stage_of(spec)
        self.device = device_of(job)
        self.asynchronous = self.device.type != "cpu"
        if not self.asynchronous:
            keep_freed_memory()
            quicken_attention()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # this process may have had another engine
        timeout = collective_timeout(spec.launch.hang_minutes)
        start_process_group(job, self.device, timeout)
        fp16 = spec.precision.dtype == "fp16"
        if fp16:
            require_fp16(self.device)
        self.data_rank, self.data_size = job.rank, job.world
        self.drive = Drive(cast(dict[str, Any], resolved.settings["ds_config"]))
        built = build(source, self.drive.config, self.stage, job)
        sizes = built_sizes(spec, built.model, job.world)
        self.drive.config = sized(self.drive.config, sizes or {})
        self.resolved = completed(resolved, sizes or {})
        self.notes: Sequence[str] = built.notes if sizes is not None else (*built.notes, UNSIZED)
        self.parameter_count = built.parameter_count
        compile_model(built.model, spec)
        checkpoint_activations(built.model, spec)
        self.first_step = FirstStep(spec, first_rank=job.rank == 0)
        self.parks_activations = spec.techniques.offload.activations.enabled
        self.threads = torch.get_num_threads()
        self.matmul_precision = torch.get_float32_matmul_precision()
        self.optimizer = build_optimizer(spec.optimizer, built.model, built.decayed)
        self.engine, *_ = deepspeed.initialize(
            model=built.model, optimizer=self.optimizer, config=self.drive.config
        )
        self.replicated = list(built.model.parameters()) if self.stage == 0 else []
        if self.stage == 3:
            bound_gathering(self.engine)
        self._vetoed = False
        self._votes = Votes(job.world, timeout)
        self.scaler = DeferredGrowth(self.engine.optimizer.loss_scaler) if fp16 else None
        torch.manual_seed(spec.train.seed + job.rank)  # dropout, from here on
        self.engine.train()

    def train_step(self, step: StepInput, accept: Accept | None, trace: Trace) -> StepResult:
        """One update of all ranks; a full device raises OutOfMemory on the rank that has it."""
        with communication_traced(trace):
            with self._watch_memory("step"), self.first_step.told():
                loss_sum = self._accumulate(step, trace)
            with self._watch_memory("update"):
                return self._update(step, loss_sum, accept, trace)

    def _accumulate(self, step: StepInput, trace: Trace) -> torch.Tensor:
        """Forward and backward of this rank's micro-batches; returns its sum of token losses.

        DeepSpeed averages gradients over ranks, so the loss is multiplied by their number; it is told
        not to divide by the accumulation. What is left is the sum over the global batch, divided by
        its targets.
        """
        loss_sum = torch.zeros((), device=self.device)
        last = len(step.micro_batches) - 1
        for index, batch in enumerate(step.micro_batches):
            with trace.span("forward"):
                loss = self.forward(batch)
            with trace.span("backward"):
                self.engine.backward(loss * (self.data_size / step.target_tokens), scale_wrt_gas=False)
            loss_sum += loss.detach()
            if index != last:
                self.engine.step()  # counts the micro-batch; DeepSpeed updates at the last one
        return loss_sum

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum of token losses, with a graph for the backward pass."""
        with keeping(self.stage, self.parks_activations, keeps_strides=self.spec.train.compile):
            loss: torch.Tensor = self.engine(*on_device(batch, self.device))
        return loss

    def _update(
        self, step: StepInput, loss_sum: torch.Tensor, accept: Accept | None, trace: Trace
    ) -> StepResult:
        scale = self.scaler.scale if self.scaler else None
        with trace.span("optimizer"):
            norm = self._clip_and_step(step, loss_sum, accept)
        skipped = self._vetoed or self._overflowed()
        return StepResult(step.step, step.target_tokens, loss_sum, norm, skipped, scale)

    def _clip_and_step(
        self, step: StepInput, loss_sum: torch.Tensor, accept: Accept | None
    ) -> torch.Tensor | float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = step.lr
        own_norm = clip_replicated(self.replicated, self.spec.train.clip) if self.replicated else None
        self._vetoed = False
        self.optimizer.veto = self._ask_once(accept, step, loss_sum, own_norm) if accept else None
        self.engine.step()
        if self.scaler:
            self.scaler.after_step()
        elif self.optimizer.veto and self._overflowed():
            self.optimizer.veto()  # DeepSpeed skipped it before asking; the guard counts it all the same
        return own_norm if own_norm is not None else self.engine.get_global_grad_norm()

    def _overflowed(self) -> bool:
        return bool(getattr(self.engine.optimizer, "overflow", False))

    def _ask_once(
        self, accept: Accept, step: StepInput, loss_sum: torch.Tensor, own_norm: torch.Tensor | None
    ) -> Callable[[], bool]:
        """The optimizer's veto: asks the guard at DeepSpeed's first call, when the norm is known."""
        loss = float(self._reduced(loss_sum)) / step.target_tokens
        verdict: list[bool] = []

        def veto() -> bool:
            if not verdict:
                norm = own_norm if own_norm is not None else self.engine.optimizer._global_grad_norm
                verdict.append(not accept(loss, float(norm)))
                self._vetoed = verdict[0]
            return verdict[0]

        return veto

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        self.engine.eval()
        total = torch.zeros((), device=self.device)
        tokens = 0
        with torch.no_grad(), uncompiled(self.spec):
            for batch in batches:
                with self._watch_memory("evaluation"):
                    total += self.engine(*on_device(batch, self.device))
                tokens += int((batch.targets != IGNORED_TARGET).sum())
        self.engine.train()
        # float32 counts exactly only to 2^24, so the tokens are summed as integers.
        all_tokens = self._reduced(torch.tensor(tokens, device=self.device))
        return LossSum(float(self._reduced(total)), int(all_tokens))

    def fetch(self, results: Sequence[StepResult]) -> list[StepValues]:
        if not results:
            return []
        losses = self._reduced(torch.stack([torch.as_tensor(r.loss_sum) for r in results]))
        norms = torch.stack([torch.as_tensor(r.grad_norm, device=self.device) for r in results])
        pairs = torch.stack([losses, norms.to(losses.dtype)]).tolist()
        return [
            StepValues(r.step, loss / r.target_tokens, norm, bool(r.skipped), r.loss_scale)
            for r, loss, norm in zip(results, *pairs, strict=True)
        ]

    def memory(self) -> Memory:
        return memory_of(self.device, self.holdings())

    def holdings(self) -> Holdings:
        return holdings(self.engine, self._shards().flat())

    def state_layout(self) -> dict[StateKey, StateForm]:
        return state.state_layout(self._shards())

    def export_state(self, owner: Callable[[str], int]) -> Iterator[StatePiece]:
        return state.export_state(self._shards(), self.data_rank, owner)

    def import_state(self, reader: StateReader) -> None:
        state.import_state(self._shards(), reader)

    def extras(self) -> dict[str, JSON]:
        return {
            **self._shards().step_counts().as_extras(),
            "loss_scaler": self.scaler.state() if self.scaler else None,
            "random": random_state(self.device),
        }

    def restore_extras(self, extras: Mapping[str, Any]) -> None:
        self.notes = [*self.notes, *self._shards().set_step_counts(stored_counts(extras))]
        if self.scaler and extras.get("loss_scaler"):
            self.scaler.restore(extras["loss_scaler"])
        set_random_state(self.device, extras.get("random") or {})

    def gather(self, value: JSON) -> list[JSON]:
        if self.data_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.data_size
        dist.all_gather_object(gathered, value)
        return gathered

    def any(self, flag: bool) -> bool:
        return self._votes.any(flag)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def matmul_peak(self) -> MatmulPeak | None:
        return matmul_peak(self.device, self.spec.precision.dtype, self.synchronize)

    def device_busy(self) -> float | None:
        return device_busy(self.device)

    def close(self) -> None:
        self._votes.close()
        self.engine.destroy()
        self.drive.close()

    def _reduced(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, on every rank."""
        if self.data_size == 1:  # always on a Mac, of whose GPU gloo takes no tensors
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def _shards(self) -> Shards:
        return shards_of(self.engine, self.stage)

    def _watch_memory(self, moment: Moment) -> AbstractContextManager[None]:
        return watch_memory(self.device, moment, self.holdings)


def start_engine(resolved: Resolved, source: ModelSource, job: Job) -> DeepSpeedEngine:
    """Raises OutOfMemory where the model does not fit."""
    with watch_memory(device_of(job), "start", dict):
        return DeepSpeedEngine(resolved, source, job)
