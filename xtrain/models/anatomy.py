"""Finds the head of a language model of the transformers library, and what becomes of its output.

By experiment on the model at hand, not by its name: a few tokens go through it, and hooks on its head
see what comes in and plant what goes out. So a model that nobody has heard of is understood or left
alone, and no list of families has to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xtrain.models.loss import PLAIN, LogitForm

PROBE_TOKENS = 8
SMALL, LARGE = 2.0**-8, 1e9
PLANTED = (0.0, SMALL, -0.5, 1.0, -7.0, 60.0, -1e3, LARGE)
"""Outputs of a head: the first ones show a scale, the last ones a cap."""


class UnknownHead(Exception):
    """The model's loss cannot be taken by chunks; the message says why."""


@dataclass(frozen=True)
class Head:
    """Where it is, and what the model makes of its output."""

    path: str
    form: LogitForm = PLAIN


def find_head(model: nn.Module) -> Head:
    """The nn.Linear that turns `model.base_model`'s last hidden state into logits.

    Raises UnknownHead where there is none, or where the model does something else around it.
    """
    linear = _output_layer(model)
    with _resting(model):
        given, logits = _plant(model, linear)
        hidden = _last_hidden_state(model)
    if hidden is None or not torch.allclose(hidden, given, rtol=1e-4, atol=1e-5):
        raise UnknownHead("its head is given something else than the last hidden state")
    form = _form(_planted(logits), logits)
    if form is None:
        raise UnknownHead("it changes its head's output in a way that is not known here")
    return Head(next(path for path, module in model.named_modules() if module is linear), form)


def is_causal(model: nn.Module) -> bool:
    """Whether what `model` says of a token is the same whatever comes after it."""
    tokens = _probe(model)
    tokens[1, -1] = tokens[1, 0]
    with _resting(model):
        logits = model(input_ids=tokens).logits
    return torch.allclose(logits[0, :-1], logits[1, :-1], rtol=1e-4, atol=1e-5)


def _output_layer(model: nn.Module) -> nn.Linear:
    find = getattr(model, "get_output_embeddings", None)
    linear = find() if callable(find) else None
    if type(linear) is not nn.Linear:
        found = f"is a {type(linear).__name__}" if linear is not None else "is not named"
        raise UnknownHead(f"its head {found}; expected an nn.Linear")
    return linear


def _plant(model: nn.Module, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head was given in one pass of the model, and the logits that came of PLANTED."""
    given: list[torch.Tensor] = []

    def plant(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        given.append(args[0])
        return _planted(output)

    hook = linear.register_forward_hook(plant)
    try:
        logits = model(input_ids=_probe(model)).logits
    finally:
        hook.remove()
    if len(given) != 1:
        raise UnknownHead(f"a pass calls its head {len(given)} times")
    return given[0], logits


def _planted(like: torch.Tensor) -> torch.Tensor:
    """PLANTED over and over, in the shape of `like`."""
    values = torch.tensor(PLANTED, dtype=like.dtype)
    return values.repeat(like.numel() // len(values) + 1)[: like.numel()].view_as(like)


def _form(output: torch.Tensor, logits: torch.Tensor) -> LogitForm | None:
    """The LogitForm that makes `logits` of `output`; None where there is none."""
    scale = float(logits[output == SMALL][0]) / SMALL
    largest = float(logits[output == LARGE][0])
    capped = abs(largest) < abs(scale) * LARGE / 2
    form = LogitForm(1.0 if abs(scale - 1) < 1e-6 else scale, largest if capped else None)
    return form if torch.allclose(form.apply(output), logits, rtol=1e-5, atol=1e-6) else None


def _last_hidden_state(model: nn.Module) -> torch.Tensor | None:
    body: Any = model.base_model
    hidden = getattr(body(input_ids=_probe(model)), "last_hidden_state", None) if body is not model else None
    return hidden if isinstance(hidden, torch.Tensor) else None


def _probe(model: nn.Module) -> torch.Tensor:
    """int64 [2, PROBE_TOKENS], the same two rows each time."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    row = torch.arange(1, PROBE_TOKENS + 1) % embedding.num_embeddings
    probe: torch.Tensor = row.repeat(2, 1)
    return probe


@contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradients; then as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
