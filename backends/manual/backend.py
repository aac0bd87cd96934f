"""What the hand-written engine can honour, what it decides, and how it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from xtrain.contract import JSON, Availability, Job, ModelSource, Problem, Resolved
from xtrain.errors import RequestError
from xtrain.plan.layout import DEVICE, HOST
from xtrain.techniques.compiled import compile_notes

from .here import missing_here
from .support import device_names, find_idle, find_problems

if TYPE_CHECKING:
    from xtrain.plan.places import Places
    from xtrain.spec.tree import Spec

    from .engine import ManualEngine


class ManualBackend:
    """One of `cpu`, `mps`, `cuda`: the same code on another device."""

    def __init__(self, device: str) -> None:
        self.name = device

    def probe(self) -> Availability:
        from .devices import device_of

        return device_of(self.name).probe()

    def facts(self) -> Mapping[str, JSON]:
        from .devices import device_of

        device = device_of(self.name)
        return device.facts() if device.probe().usable else {}

    def problems(self, spec: Spec, world: int) -> list[Problem]:
        return find_problems(spec, world, self.name)

    def missing_here(self, spec: Spec) -> list[Problem]:
        return list(missing_here(spec, self.name))

    def notes(self, spec: Spec, world: int) -> list[str]:
        return [*compile_notes(spec), *find_idle(spec, self.name).values()]

    def resolve(self, spec: Spec, world: int) -> Resolved:
        from .devices import device_of

        names = device_names(spec, self.name)
        settings: dict[str, JSON] = {
            "device": self.name,
            "layers_over": names,
            "weights_dtype": spec.precision.weights,
            "compute_dtype": spec.precision.dtype,
            "accumulation": spec.accumulation(world),
            "fused_optimizer": all(
                device_of(name).fused_optimizer
                for name in (["cpu"] if spec.techniques.offload.optimizer.enabled else names)
            ),
        }
        idle = list(find_idle(spec, self.name))
        return Resolved(self.name, spec, world, settings, self.notes(spec, world), idle=idle)

    def place(self) -> str:
        return HOST if self.name == HOST else DEVICE

    def layout(self, spec: Spec, world: int, device: str) -> Places | None:
        from .layout import layout_of

        return layout_of(spec, device)

    def room_bytes(self, job: Job) -> int | None:
        from .devices import device_of

        return device_of(self.name).limit_bytes()

    def start(self, resolved: Resolved, model: ModelSource, job: Job) -> ManualEngine:
        from .devices import device_of
        from .engine import ManualEngine

        spec = resolved.spec
        names = device_names(spec, self.name)
        devices = [device_of(name) for name in names]
        for name, device in zip(names, devices, strict=True):
            found = device.probe()
            if not found.usable:
                raise RequestError(f"manual.devices: {name} cannot be used here: {found.reason}")
            for dtype in {spec.precision.dtype, spec.precision.weights}:
                if reason := device.lacks(dtype):
                    raise RequestError(f"precision {dtype} on {name}: {reason}")
        return ManualEngine(spec, model, devices)
