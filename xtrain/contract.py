"""The seam between xtrain (what happens) and a backend (how it happens on one kind of engine).

The cut is one optimizer step over a list of micro-batches. This module imports neither torch nor
numpy at run time, so that a backend can be looked up, probed and asked about a spec in
milliseconds. docs/backends.md is the guide for those who write one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from xtrain.printable import printable

if TYPE_CHECKING:
    import numpy as np
    import torch

    from xtrain.spec.tree import Spec

# What json.dumps takes; a recursive alias would need `type`, which Python 3.11 has not.
JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

IGNORED_TARGET = -100
"""A target with this value has no loss (PyTorch's `ignore_index` default)."""


# --- before a run: what is asked, and can it be done here? -------------------------------------


@dataclass(frozen=True)
class Problem:
    """One thing in a spec that cannot be honoured, with its place in the file where it is known."""

    path: str
    """Dotted key, such as `batch.global`; empty for the file as a whole."""
    found: str
    """What stands there, as it is to be printed; empty when the key is missing."""
    expected: str
    nearest: str = ""
    """The nearest thing that works: a key, a value, or what to do."""
    line: int | None = None
    column: int | None = None
    origin: str = ""
    """The `--set ...` it comes from; empty when it comes from the file."""

    def __str__(self) -> str:
        place = f"{self.line}:{self.column}: " if self.line is not None else ""
        place = f"{self.origin}: " if self.origin else place
        subject = f"{self.path}: " if self.path else ""
        found = f"found {self.found}, " if self.found else ""
        nearest = f"; {self.nearest}" if self.nearest else ""
        return printable(f"{place}{subject}{found}{self.expected}{nearest}")


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used on this machine, and why (not)."""

    usable: bool
    reason: str
    preference: int | None = None
    """How well it suits this machine; `--backend auto` takes the highest. None: only when named."""


@dataclass(frozen=True)
class Job:
    """This process's place among the processes of a run."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1


@dataclass(frozen=True)
class Resolved:
    """A spec with everything decided for one backend and world size; goes into resolved.json."""

    backend: str
    spec: Spec
    world: int
    settings: Mapping[str, JSON] = field(default_factory=dict)
    """What the backend decided: dtypes, placement, a ds_config, ..."""
    notes: Sequence[str] = ()
    """What a person should know about those decisions, a sentence each."""
    files: Mapping[str, JSON] = field(default_factory=dict)
    """Written into the run directory as they are, by file name."""
    idle: Sequence[str] = ()
    """Keys of the spec, or sections, that have nothing to do here; a note says why of each."""


class Backend(Protocol):
    """One way to run a spec. Stateless; importing and constructing it imports nothing heavy."""

    name: str

    def probe(self) -> Availability:
        """Is it usable on this machine? May import torch; never raises."""
        ...

    def facts(self) -> Mapping[str, JSON]:
        """For `xtrain doctor`: dtypes, limits, settings on this machine. May import torch; never raises."""
        ...

    def problems(self, spec: Spec, world: int) -> list[Problem]:
        """Every key of `spec` that this backend cannot honour with `world` processes.

        Runs anywhere, also where the backend itself cannot, and imports nothing heavy.
        """
        ...

    def resolve(self, spec: Spec, world: int) -> Resolved: ...

    def start(self, resolved: Resolved, model: ModelSource, job: Job) -> Engine:
        """Build the engine. Collective: every process of the job calls it."""
        ...


@runtime_checkable
class LooksAround(Protocol):
    """A backend that can tell what of a spec this machine has not: for `xtrain check`, which refuses nothing
    for it, as a spec may be for another machine."""

    def missing_here(self, spec: Spec) -> list[Problem]:
        """As far as can be seen without loading anything heavy; a run looks again when it starts."""
        ...


@runtime_checkable
class Foretells(Protocol):
    """A backend that can tell before a run what it will say of its decisions: for `xtrain check`."""

    def notes(self, spec: Spec, world: int) -> list[str]:
        """As in Resolved, a sentence each. Runs anywhere and imports nothing heavy."""
        ...


class ModelSource(Protocol):
    """Builds the model of a spec; the backend decides when and where."""

    description: str
    """For people: "gpt2-nano, 4 layers x 128"."""

    def build(self) -> torch.nn.Module:
        """A module on the CPU in fp32 that maps (tokens, targets) to the sum of token losses.

        tokens, targets: int64 [sequences, seq_len]; targets of IGNORED_TARGET do not count.
        Returns a 0-dim float32 tensor. The weights are the initial ones, a function of the seed
        and the parameter's name alone.
        """
        ...

    def decayed(self, name: str, parameter: torch.nn.Parameter) -> bool:
        """Whether weight decay applies: to matrices, not to biases and norms."""
        ...


@runtime_checkable
class PiecewiseSource(ModelSource, Protocol):
    """A source whose model need not exist as a whole: an engine may cut up each weight as it is drawn."""

    def skeleton(self) -> torch.nn.Module:
        """The model with its parameters on the meta device: names, shapes and ties, no numbers."""
        ...

    def weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The initial value of one parameter, on the CPU in fp32; the same as in `build`."""
        ...


@runtime_checkable
class GradualSource(ModelSource, Protocol):
    """A source that reads stored weights, and can do so one at a time."""

    def build_gradually(self) -> torch.nn.Module:
        """As `build`, in more time, for an engine that cuts up each parameter once it is registered."""
        ...


# --- during a run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Sequences on the host, ready for one forward pass."""

    tokens: np.ndarray
    """int64 [sequences, seq_len]"""
    targets: np.ndarray
    """int64 [sequences, seq_len], the next token of each; IGNORED_TARGET where masked."""


@dataclass(frozen=True)
class StepInput:
    """All that one optimizer step needs."""

    step: int
    """0-based index of the update."""
    micro_batches: Sequence[Batch]
    """This data rank's share of the global batch."""
    lr: float
    target_tokens: int
    """Targets that count in the *global* batch: every engine divides the loss sum by it."""


@dataclass(frozen=True)
class StepResult:
    """What train_step leaves behind; the tensors stay on the device until `fetch`."""

    step: int
    target_tokens: int
    loss_sum: torch.Tensor | float
    """This rank's sum of token losses."""
    grad_norm: torch.Tensor | float | None
    """Global, before clipping, without any loss scale; None when the engine cannot know it."""
    skipped: torch.Tensor | bool = False
    loss_scale: float | None = None


@dataclass(frozen=True)
class StepValues:
    """A StepResult as numbers, equal on every rank."""

    step: int
    loss: float
    """Mean over the global batch's targets."""
    grad_norm: float | None
    skipped: bool
    loss_scale: float | None


@dataclass(frozen=True)
class LossSum:
    """Evaluation over all ranks: the mean loss is total / tokens."""

    total: float
    tokens: int


@dataclass(frozen=True)
class Counter:
    """One way of counting memory; counters of unlike kinds are never put in one column."""

    bytes: int
    peak_bytes: int | None
    method: Literal["counter", "sampled", "unavailable"]
    """How the peak was got."""


@dataclass(frozen=True)
class Memory:
    """What one rank's device holds. None where it cannot be known."""

    live: Counter | None
    """Bytes in live tensors."""
    reserved: Counter | None
    """Bytes the allocator or driver holds; reserved - live is slack."""
    categories: Mapping[str, int] | None
    """Bytes now by MEMORY_CATEGORIES on this rank's device, where the engine can tell."""


ByPlace: TypeAlias = "Mapping[str, Mapping[str, int]]"
"""Bytes by place ("cpu", "cuda:0", ...), then by MEMORY_CATEGORIES."""
HOST = "cpu"
"""The place that every machine has, as torch calls it: the host's own memory, whatever it computes on."""
Holdings: TypeAlias = "Mapping[str, Iterable[torch.Tensor]]"
"""Tensors by MEMORY_CATEGORIES."""


@dataclass(frozen=True)
class StepMemory:
    """What one step held at its fullest, counted storage by storage (xtrain/measure/ledger.py)."""

    step: int
    """1-based, as in metrics.jsonl."""
    peaks: ByPlace
    """Each place at its own fullest moment."""
    finished: bool = True
    """False where it broke off: then more would have come."""


MEMORY_CATEGORIES = (
    "parameters",
    "master",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "other",
)

Phase: TypeAlias = Literal["data", "forward", "backward", "reduce", "optimizer"]


class Trace(Protocol):
    """Marks the phases of a step; a no-op except on every K-th step (xtrain/measure/trace.py)."""

    timed: bool
    """Whether spans read the clock. Then an engine waits inside them for what else overlaps other phases."""

    def span(self, phase: Phase) -> AbstractContextManager[None]:
        """May lie inside another span: its time is then its own, and not the outer one's."""
        ...


Accept: TypeAlias = Callable[[float, float | None], bool]
"""Asked with (loss, grad_norm) between clipping and update; False skips the update everywhere."""


StateKind: TypeAlias = Literal["weight", "buffer", "exp_avg", "exp_avg_sq", "momentum"]
"""What of a parameter; the optimizer's names are torch's (`momentum` is SGD's momentum_buffer)."""


StateKey: TypeAlias = "tuple[str, StateKind]"
"""A tensor of the training state, by the parameter's or buffer's name in the model that ModelSource built."""


@dataclass(frozen=True)
class StateForm:
    """What one tensor of the training state is when it is whole and on the host."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    """torch's name; buffers have their own, all else is fp32."""


@dataclass(frozen=True)
class StatePiece:
    """Consecutive elements of one tensor of the training state, in its StateForm's dtype, on any device."""

    name: str
    kind: StateKind
    value: torch.Tensor
    """Of any shape. May be the engine's own memory, so it holds until the next train_step: copy what is kept
    longer."""
    begin: int = 0
    """Place of its first element in the whole tensor, counted row by row."""


class StateReader(Protocol):
    """Gives the tensors of a stored state, one at a time."""

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        """None when the state has no such tensor (no update was made yet)."""
        ...


class Engine(Protocol):
    """Alive during one run. Every method is collective unless it says otherwise."""

    data_rank: int
    """Place among replicas: which slice of the global batch."""
    data_size: int
    asynchronous: bool
    """Whether train_step may return before the device is done."""
    parameter_count: int
    """Of the whole model, tied parameters once, over all ranks."""
    threads: int | None
    """For arithmetic on the host, per process; None where there is none."""
    matmul_precision: str | None
    """Of fp32 matrix products, as the engine's library names it."""
    notes: Sequence[str]
    """What it decided when it saw the model, a sentence each."""

    def train_step(self, step: StepInput, accept: Accept | None, trace: Trace) -> StepResult: ...

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        """Sum of token losses without dropout; the same number of batches on every rank."""
        ...

    def fetch(self, results: Sequence[StepResult]) -> list[StepValues]:
        """Bring a logging window to the host: one synchronisation, one all-reduce."""
        ...

    def memory(self) -> Memory:
        """Local: this rank's device."""
        ...

    def holdings(self) -> Holdings:
        """Local: what stays in memory from step to step, on whatever device; empty where it cannot tell."""
        ...

    def state_layout(self) -> Mapping[StateKey, StateForm]:
        """Local, and the same on every rank: all that export_state yields, whole; moments once they exist."""
        ...

    def export_state(self, owner: Callable[[str], int]) -> Iterator[StatePiece]:
        """This rank's pieces of weights, buffers and moments: each element comes from exactly one rank.

        What several ranks hold alike comes from rank owner(name); tied tensors once, 16-bit weights from
        their fp32 masters. Training waits for it: no communication, if possible. Every rank must draw all.
        """
        ...

    def import_state(self, reader: StateReader) -> None:
        """Replace weights, buffers and moments by the reader's; ValueError names what does not fit."""
        ...

    def extras(self) -> dict[str, JSON]:
        """Local: what else this rank needs to go on exactly: update counts, loss scaler, random states."""
        ...

    def restore_extras(self, extras: Mapping[str, JSON]) -> None:
        """Local; after import_state. Keys of another backend's that mean nothing here are left out."""
        ...

    def gather(self, value: JSON) -> list[JSON]:
        """`value` of every rank, in rank order, on every rank. For small things, seldom."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether any rank said so, at this call or the one before. Called at every step, so it is cheap."""
        ...

    def synchronize(self) -> None:
        """Local: wait for this rank's device."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class DecidesLater(Protocol):
    """An engine some of whose settings follow from the built model."""

    resolved: Resolved
    """What it was started with, and these."""


Moment: TypeAlias = Literal["start", "step", "update", "evaluation"]
"""Where in a run: before the first step, in forward and backward, while weights change, in an evaluation."""
WHEN: Mapping[Moment, str] = {
    "start": "before the first step, while the model was put in its place",
    "step": "in the middle of a step",
    "update": "while it updated the weights",
    "evaluation": "in the middle of an evaluation",
}


class OutOfMemory(Exception):
    """A device is full. The one backend exception the loop knows."""

    def __init__(self, device: str, memory: Memory, moment: Moment) -> None:
        super().__init__(f"{device} is out of memory {WHEN[moment]}")
        self.device = device
        self.memory = memory
        """Of that device, when it was full."""
        self.moment = moment
        """In an update, weights and moments may be half of the last step and half of this one."""
