"""Copies beside the computation: what is held for them, under a model of CUDA's streams.

Tensors are on the simulated device, and copies happen at once. Simulated is who knows of it: to the host a
copy is over when it has waited for it, and not before.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from tests.simulated import device as _makes_the_device  # noqa: F401
from tests.simulated.counting import MEMORY, NAME

transfers: Any = importlib.import_module("xtrain.backends.manual.transfers")
activations: Any = importlib.import_module("xtrain.backends.manual.activations")
gradients: Any = importlib.import_module("xtrain.backends.manual.gradients")

NUMBERS = 256
BYTES = 4 * NUMBERS


class Event:
    """Recorded on a stream: whoever waits for it, waits for what was queued there before."""

    def __init__(self, after: set[Event]) -> None:
        self.after = {*after, self}
        self.over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        for event in self.after:
            event.over = True


class Stream:
    def __init__(self, device: object = None) -> None:
        self.after: set[Event] = set()
        """What everything queued here from now on comes after."""

    def record_event(self) -> Event:
        event = Event(self.after)
        self.after = {*self.after, event}
        return event

    def wait_event(self, event: Event) -> None:
        self.after |= event.after

    def wait_stream(self, other: Stream) -> None:
        self.after |= other.after


@pytest.fixture
def computation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """The stream that a device's computation is queued on."""
    stream = Stream()

    def on(side: Stream) -> AbstractContextManager[None]:
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(transfers, "overlaps", lambda device: device.type == NAME)
    monkeypatch.setattr(transfers, "pinned_like", lambda tensor: torch.empty_like(tensor, device="cpu"))
    transfers.lane_of.cache_clear()
    yield stream
    transfers.lane_of.cache_clear()


class Freed:
    """Watches tensors of the device: which copies were neither waited for nor over when memory was freed."""

    def __init__(self, computation: Stream) -> None:
        self.computation = computation
        self.count = 0
        self.too_early = 0

    def watch(self, tensor: torch.Tensor, copy: Event) -> None:
        weakref.finalize(tensor.untyped_storage(), self._freed, copy).atexit = False

    def _freed(self, copy: Event) -> None:
        self.count += 1
        self.too_early += not (copy.over or copy in self.computation.after)


def on_device() -> torch.Tensor:
    return torch.ones(NUMBERS, device=NAME)


def test_a_host_that_runs_ahead_leaves_few_tensors_on_the_device(computation: Stream) -> None:
    before, freed = MEMORY[0].live_bytes, Freed(computation)
    MEMORY[0].reset_peak()
    for _ in range(50):
        tensor = on_device()
        freed.watch(tensor, transfers.to_host(tensor).arrived)
    del tensor
    assert MEMORY[0].peak_bytes - before <= (transfers.UNDERWAY + 2) * BYTES
    assert freed.count >= 50 - transfers.UNDERWAY - 1
    assert freed.too_early == 0


def test_what_comes_back_ahead_of_its_use_is_not_much_either(computation: Stream) -> None:
    sent = [transfers.to_host(on_device()) for _ in range(50)]
    before, freed = MEMORY[0].live_bytes, Freed(computation)
    MEMORY[0].reset_peak()
    for one in sent:
        coming = transfers.to_device(one, torch.device(NAME, 0))
        freed.watch(coming.tensor, coming.arrived)
        assert coming.result().cpu().sum() == NUMBERS
        assert coming.arrived in computation.after
    del coming
    assert MEMORY[0].peak_bytes - before <= 2 * BYTES
    assert freed.count == 50
    assert freed.too_early == 0


def test_what_came_back_and_nobody_asked_for_is_held_until_its_copy_is_over(computation: Stream) -> None:
    sent, freed = transfers.to_host(on_device()), Freed(computation)
    for _ in range(20):
        unused = transfers.to_device(sent, torch.device(NAME, 0))
        freed.watch(unused.tensor, unused.arrived)
    del unused
    assert freed.count == 20 - transfers.UNDERWAY
    assert freed.too_early == 0


def test_a_copy_begins_after_what_was_computed_and_what_comes_back_after_it_was_sent(
    computation: Stream,
) -> None:
    computed = computation.record_event()
    sent = transfers.to_host(on_device())
    assert computed in sent.arrived.after
    later = computation.record_event()
    coming = transfers.to_device(sent, torch.device(NAME, 0))
    assert {later, sent.arrived} <= coming.arrived.after  # its memory may have been another's until `later`


def test_the_host_waits_for_what_it_reads_and_then_nothing_is_held(computation: Stream) -> None:
    before = MEMORY[0].live_bytes
    sent = transfers.to_host(on_device())
    assert not sent.done()
    assert sent.result().sum() == NUMBERS
    assert sent.done()
    assert MEMORY[0].live_bytes == before


def test_a_part_of_something_wider_is_sent_as_one_piece(computation: Stream) -> None:
    wide = torch.arange(24.0).view(4, 6)
    sent = transfers.to_host(wide.to(NAME)[:, 2:4])
    assert torch.equal(sent.result(), wide[:, 2:4])
    assert sent.tensor.is_contiguous()


def test_gradients_leave_their_device_as_they_come(computation: Stream) -> None:
    """Of a pass that the host has queued as a whole before the first copy is over."""
    parameters = [torch.nn.Parameter(on_device()) for _ in range(40)]
    kept = gradients.HostGradients(parameters)
    before = MEMORY[0].live_bytes
    MEMORY[0].reset_peak()
    for parameter in parameters:
        parameter.grad = on_device()
        kept._send(parameter)
    assert MEMORY[0].peak_bytes - before <= (transfers.UNDERWAY + 2) * BYTES
    assert all(kept.take(parameter).sum() == NUMBERS for parameter in parameters)
    assert MEMORY[0].live_bytes == before


WIDE = torch.arange(24.0).view(4, 6)
PARTS: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = {
    "a part": (WIDE, lambda t: t[:, 2:4]),
    "turned": (WIDE, lambda t: t.transpose(0, 1)),
    "repeated": (WIDE[:1], lambda t: t.expand(3, 6)),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_autograd_kept_comes_back_laid_out_as_it_was(computation: Stream, name: str) -> None:
    """A query is a part of what one product made, and compiled code looks at its stride."""
    whole, part = PARTS[name]
    kept = part(whole.to(NAME))
    current = activations.Pass(torch.nn.Identity(), keeps_strides=True)
    found = current.fetch(current.park(kept))
    assert torch.equal(found.cpu(), part(whole))
    assert found.stride() == kept.stride() or name == "repeated"
