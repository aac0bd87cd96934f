"""Lightning's Trainer in its leanest form: `barebones` turns off what it does beside training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from benchmarks import measured, workload
from benchmarks.peer_programs.common import (
    Sequences,
    build_model,
    build_optimizer,
    build_schedule,
    step_losses,
)
from benchmarks.workload import Workload


class Module(LightningModule):  # type: ignore[misc]
    def __init__(self, load: Workload, clock: measured.Clock) -> None:
        super().__init__()
        self.load = load
        self.model = build_model(load)
        self.clock = clock
        self.micro_losses: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], place: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch["tokens"], batch["targets"])
        self.micro_losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.load, self.model)
        schedule = {"scheduler": build_schedule(self.load, optimizer), "interval": "step"}
        return [optimizer], [schedule]

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Lightning's own refuses a fused optimizer under bf16-mixed, although nothing is scaled there."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.load.clip)

    def on_train_start(self) -> None:
        self.clock.begin()

    def on_train_batch_end(self, outputs: Any, batch: Any, place: int) -> None:
        if (place + 1) % self.load.accumulation == 0:
            self.clock.step_ended()


def train(folder: Path) -> measured.Training:
    load, batches = workload.read(folder)
    clock = measured.Clock()
    module = Module(load, clock)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if load.precision == "bf16" else "32-true",
        max_steps=load.steps,
        accumulate_grad_batches=load.accumulation,
        barebones=True,
    )
    trainer.fit(module, DataLoader(Sequences(batches), batch_size=load.micro_batch))
    return clock.training(step_losses(module.micro_losses, load))


if __name__ == "__main__":
    measured.main(train)
