"""The Trainer of Hugging Face's transformers, with nothing on that the task does not need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks import measured, workload
from benchmarks.peer_programs.common import (
    Sequences,
    build_model,
    build_optimizer,
    build_schedule,
    step_losses,
)


class LossTrainer(Trainer):
    """For a model that returns its loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.micro_losses: list[torch.Tensor] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = model(inputs["tokens"], inputs["targets"])
        self.micro_losses.append(loss.detach())
        return loss


class StepEnds(TrainerCallback):
    def __init__(self, clock: measured.Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step_ended()


def train(folder: Path) -> measured.Training:
    load, batches = workload.read(folder)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=load.steps,
        per_device_train_batch_size=load.micro_batch,
        gradient_accumulation_steps=load.accumulation,
        max_grad_norm=load.clip,
        bf16=load.precision == "bf16",
        use_cpu=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=load.seed,
    )
    model = build_model(load)
    optimizer = build_optimizer(load, model)
    clock = measured.Clock()
    trainer = LossTrainer(
        model,
        arguments,
        train_dataset=Sequences(batches),
        optimizers=(optimizer, build_schedule(load, optimizer)),
        callbacks=[StepEnds(clock)],
    )
    trainer.train()
    return clock.training(step_losses(trainer.micro_losses, load))


if __name__ == "__main__":
    measured.main(train)
