"""Lightning Fabric: one's own loop, with set-up, backward and clipping by the library."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from benchmarks import measured, workload
from benchmarks.peer_programs.common import (
    Sequences,
    build_model,
    build_optimizer,
    build_schedule,
    step_losses,
)


def train(folder: Path) -> measured.Training:
    load, batches = workload.read(folder)
    precision = "bf16-mixed" if load.precision == "bf16" else "32-true"
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    module = build_model(load)
    model, optimizer = fabric.setup(module, build_optimizer(load, module))
    schedule = build_schedule(load, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(Sequences(batches), batch_size=load.micro_batch))
    losses, clock = [], measured.Clock()

    for number, batch in enumerate(loader, start=1):
        loss = model(batch["tokens"], batch["targets"])
        fabric.backward(loss / load.accumulation)
        losses.append(loss.detach())
        if number % load.accumulation == 0:
            fabric.clip_gradients(model, optimizer, max_norm=load.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            clock.step_ended()

    return clock.training(step_losses(losses, load))


if __name__ == "__main__":
    measured.main(train)
