"""Hugging Face Accelerate, as its documentation has a loop with accumulation and clipping."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
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
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if load.precision == "bf16" else "no",
        gradient_accumulation_steps=load.accumulation,
    )
    model = build_model(load)
    optimizer = build_optimizer(load, model)
    schedule = build_schedule(load, optimizer)
    loader = DataLoader(Sequences(batches), batch_size=load.micro_batch)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    losses, clock = [], measured.Clock()

    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch["tokens"], batch["targets"])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), load.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if accelerator.sync_gradients:
            clock.step_ended()

    return clock.training(step_losses(losses, load))


if __name__ == "__main__":
    measured.main(train)
