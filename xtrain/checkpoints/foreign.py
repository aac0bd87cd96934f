"""Training states in other programs' files become checkpoints of ours, and back.

An optional capability of a backend, like a config of its own (xtrain/exchange/translation.py). Only the
backend knows the library's files; here is what they mean to a run: which spec they are of, and that
everything fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from xtrain.checkpoints.format import ADAPTED, Checkpoint, State
from xtrain.checkpoints.writer import form_of, write_streamed
from xtrain.contract import JSON, PiecewiseSource, StateForm, StateKey, StateKind, StatePiece
from xtrain.data import open_data
from xtrain.errors import RequestError, RunFailed
from xtrain.measure.machine import RECORDED_PACKAGES, package_version
from xtrain.models.hf_folder import CONFIG
from xtrain.models.init_from import SHOWN
from xtrain.models.source import model_source
from xtrain.prepare import discarded_on_refusal
from xtrain.records.rundir import RunDirectory
from xtrain.spec import dump_spec
from xtrain.spec.tree import AdamW, Spec

if TYPE_CHECKING:
    import torch
    from torch import nn

Form: TypeAlias = Literal["hf", "deepspeed", "ds-universal"]
WRAPPER = "module."
"""What some libraries put before every name."""


class ForeignState(Protocol):
    """A training state in another program's files, read as it is asked for."""

    @property
    def step(self) -> int:
        """Updates done, skipped ones too."""
        ...

    @property
    def optimizer_steps(self) -> int:
        """As Adam's bias correction counts them."""
        ...

    @property
    def loss_scaler(self) -> Mapping[str, JSON] | None:
        """As a checkpoint's extras have it."""
        ...

    def names(self) -> Sequence[str]:
        """Of all that has weights in it."""
        ...

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        """All elements, in order; the shape may be flat. None where there is no such tensor."""
        ...


@runtime_checkable
class KeepsCheckpoints(Protocol):
    """The further methods of a Backend whose library has checkpoints of its own."""

    name: str
    readable_forms: Sequence[str]
    writable_forms: Sequence[str]

    def open_state(self, folder: Path, form: str) -> ForeignState:
        """RequestError where it is none, or holds what may not be loaded. Runs nothing that is in it."""
        ...

    def write_state(self, checkpoint: Checkpoint, form: str, folder: Path) -> Sequence[str]:
        """Into an empty folder; returns what the form cannot carry, a sentence each. Raises OSError."""
        ...


@dataclass(frozen=True)
class ImportedState:
    """A checkpoint made of another program's files, and what a person should know of it."""

    checkpoint: Checkpoint
    directory: Path
    notes: Sequence[str]


def keeper_of(form: str, writes: bool) -> KeepsCheckpoints:
    """The backend that reads or writes a form; RequestError when none that is installed does."""
    from xtrain import registry

    for backend in registry.loadable().values():
        if isinstance(backend, KeepsCheckpoints):
            forms = backend.writable_forms if writes else backend.readable_forms
            if form in forms:
                return backend
    raise RequestError(f"no backend that is installed knows {form}; `xtrain backends` lists them")


def import_state(folder: Path, form: Form, spec: Spec, out: Path) -> ImportedState:
    """A new run directory at `out` with one checkpoint in it, from which runs of `spec` go on.

    Raises RequestError when something of the model has no weights there or does not fit, RunFailed when it
    cannot be written.
    """
    data = open_data(spec, show_progress=True)
    source = model_source(_starting_from(spec, folder) if form == "hf" else spec, data.vocab_size)
    model = source.skeleton() if form != "hf" and isinstance(source, PiecewiseSource) else source.build()
    found = BuiltState(model) if form == "hf" else keeper_of(form, writes=False).open_state(folder, form)
    tensors = Tensors(model, found, spec, folder)
    layout = tensors.layout()
    directory = RunDirectory.create(out, folder.name)
    state = _state(found, form, spec, data.content_hash)
    with discarded_on_refusal(directory), directory.lock():
        try:
            written = write_streamed(directory.checkpoints, state, layout, tensors.pieces(), source.files)
        except OSError as error:
            raise RunFailed(f"cannot write {directory.checkpoints}: {error.strerror or error}") from error
    return ImportedState(written, directory.path, tensors.notes)


def _starting_from(spec: Spec, folder: Path) -> Spec:
    if not (folder / CONFIG).is_file():
        raise RequestError(f"{folder} has no {CONFIG}; expected a folder that save_pretrained wrote")
    return spec.model_copy(update={"model": spec.model.model_copy(update={"init_from": str(folder)})})


def _state(found: ForeignState, form: Form, spec: Spec, data_hash: str) -> State:
    extras: dict[str, Any] = {
        "optimizer_steps": found.optimizer_steps,
        "loss_scaler": dict(found.loss_scaler) if found.loss_scaler else None,
        "random": {},
    }
    return State(
        step=found.step,
        backend=form,
        world=1,
        guards=None,
        extras=[extras],
        data_hash=data_hash,
        spec=dump_spec(spec),
        versions={name: package_version(name) for name in RECORDED_PACKAGES},
    )


class BuiltState:
    """The weights of a model that was just built from a folder, before its first update."""

    step = optimizer_steps = 0
    loss_scaler: Mapping[str, JSON] | None = None

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        return self._tensors.get(name) if kind in ("weight", "buffer") else None


class Tensors:
    """What a model needs of a foreign state, in our names and shapes; RequestError names what is missing."""

    def __init__(self, model: nn.Module, found: ForeignState, spec: Spec, folder: Path) -> None:
        self.model = model
        self.found = found
        self.folder = folder
        self.notes: list[str] = []
        kept: tuple[StateKind, ...] = (
            ("exp_avg", "exp_avg_sq") if isinstance(spec.optimizer, AdamW) else ("momentum",)
        )
        self.parameters = dict(model.named_parameters())
        self.theirs = matched(list(self.parameters), found.names())
        trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        lacking = [name for name in trained if found.read(self.theirs(name), kept[0]) is None]
        self.moments = {name: () if name in lacking else kept for name in trained}
        if lacking and found.step:
            which = "" if lacking == trained else f" for {', '.join(lacking[:SHOWN])} ({len(lacking)} in all)"
            self.notes.append(
                f"it has no {kept[0]} of {spec.optimizer.name}{which}: the optimizer begins its own moments"
            )

    def layout(self) -> dict[StateKey, StateForm]:
        """Every tensor is looked at; the values stay on the disk where they can."""
        return {(piece.name, piece.kind): form_of(piece.value) for piece in self.pieces()}

    def pieces(self) -> Iterator[StatePiece]:
        for name, parameter in self.parameters.items():
            kinds: list[StateKind] = ["weight", *self.moments.get(name, ())]
            for kind in kinds:
                stored = self.found.read(self.theirs(name), kind)
                yield StatePiece(name, kind, self._fitting(stored, parameter, f"{kind} of {name}").float())
        for name, buffer in self.model.named_buffers():
            stored = self.found.read(self.theirs(name), "buffer")
            own = buffer if stored is None and not buffer.is_meta else stored
            yield StatePiece(name, "buffer", self._fitting(own, buffer, f"buffer {name}").to(buffer.dtype))

    def _fitting(self, stored: torch.Tensor | None, wanted: torch.Tensor, what: str) -> torch.Tensor:
        flat = stored is not None and stored.ndim == 1 and stored.numel() == wanted.numel()
        if stored is None or (not flat and stored.shape != wanted.shape):
            found = "nothing" if stored is None else tuple(stored.shape)
            raise RequestError(f"{self.folder}: {what}: found {found}, expected {tuple(wanted.shape)}")
        return stored.detach().reshape(wanted.shape)


def matched(ours: Sequence[str], theirs: Iterable[str]) -> Callable[[str], str]:
    """From our name to theirs: the same, or one of us has a wrapper's prefix that the other has not."""
    known = set(theirs)
    ways: list[Callable[[str], str]] = [
        str,
        lambda name: name.removeprefix(ADAPTED),
        lambda name: f"{WRAPPER}{name}",
        lambda name: f"{WRAPPER}{name.removeprefix(ADAPTED)}",
    ]
    for way in ways:
        if all(way(name) in known for name in ours):
            return way
    missing = [name for name in ours if name not in known]
    raise RequestError(
        f"it has no weights of {', '.join(missing[:SHOWN])} ({len(missing)} of {len(ours)} are missing); it "
        f"has {', '.join(sorted(known)[:SHOWN])}, ...: is the spec's model the one that it was saved from?"
    )
