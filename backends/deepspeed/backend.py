"""What DeepSpeed can honour, what it is told, and how it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtrain.contract import JSON, Availability, Job, ModelSource, Problem, Resolved
from xtrain.exchange.translation import Imported, Setting
from xtrain.measure.machine import host_room_bytes
from xtrain.plan.layout import DEVICE, HOST

from .environment import announce_compilation, device_of, facts, prepare, probe, sees_gpu
from .imports import import_config
from .overrides import override_notes, override_problems
from .standalone import find_standalone_problems, standalone_settings
from .support import find_idle, find_notes, find_problems, find_spec_problems
from .translate import declared_settings, engine_settings, translate
from .zero import UNBUILT, pieces_of, stage_of

if TYPE_CHECKING:
    from xtrain.checkpoints.foreign import ForeignState
    from xtrain.checkpoints.format import Checkpoint
    from xtrain.spec.tree import Spec

    from .engine import DeepSpeedEngine
    from .layout import Partitioned


class DeepSpeedBackend:
    name = "deepspeed"
    readable_forms = ("deepspeed", "ds-universal")
    writable_forms = ("ds-universal",)

    def probe(self) -> Availability:
        return probe()

    def facts(self) -> Mapping[str, JSON]:
        return facts() if probe().usable else {}

    def problems(self, spec: Spec, world: int) -> list[Problem]:
        return find_problems(spec, world)

    def notes(self, spec: Spec, world: int) -> list[str]:
        return [*find_notes(spec), *find_idle(spec, world).values()]

    def resolve(self, spec: Spec, world: int) -> Resolved:
        ds_config = translate(spec, world)
        settings: dict[str, JSON] = {"zero_stage": stage_of(spec), "ds_config": ds_config}
        files, idle = {"ds_config.json": ds_config}, list(find_idle(spec, world))
        return Resolved(self.name, spec, world, settings, self.notes(spec, world), files, idle)

    def translation(self, spec: Spec, world: int) -> list[Setting]:
        return engine_settings(spec, world)

    def translation_problems(self, spec: Spec, world: int) -> list[Problem]:
        return find_spec_problems(spec, world)

    def override_problems(self, spec: Spec, world: int) -> list[Problem]:
        return list(override_problems(spec, world, declared_settings(spec, world)))

    def translation_notes(self, spec: Spec) -> list[str]:
        found = list(override_notes(spec).values())
        return [*found, UNBUILT] if stage_of(spec) > 0 and pieces_of(spec) is None else found

    def standalone(self, spec: Spec, world: int) -> list[Setting]:
        return standalone_settings(spec, world)

    def standalone_problems(self, spec: Spec, world: int) -> list[Problem]:
        return find_standalone_problems(spec)

    def imported(
        self, config: Mapping[str, Any], world: int | None, arguments: Mapping[str, Any] | None
    ) -> Imported:
        return import_config(config, world, arguments)

    def open_state(self, folder: Path, form: str) -> ForeignState:
        from .stored import open_state

        return open_state(folder, form)

    def write_state(self, checkpoint: Checkpoint, form: str, folder: Path) -> Sequence[str]:
        from .universal import write_universal

        return write_universal(checkpoint, folder)

    def place(self) -> str:
        return DEVICE if sees_gpu() else HOST

    def layout(self, spec: Spec, world: int, device: str) -> Partitioned | None:
        from .layout import layout_of

        return layout_of(spec, world, device)

    def room_bytes(self, job: Job) -> int | None:
        """What the host has is shared by its processes; what this one's GPU allocator holds is free to it."""
        import torch

        if torch.cuda.is_available():
            device = device_of(job)
            return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return host_room_bytes() // job.local_world

    def start(self, resolved: Resolved, model: ModelSource, job: Job) -> DeepSpeedEngine:
        prepare()
        from .engine import start_engine

        if job.local_rank == 0:
            announce_compilation(resolved.spec)
        return start_engine(resolved, model, job)
