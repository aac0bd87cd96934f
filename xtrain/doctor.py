"""`xtrain doctor`: the machine, the versions and every backend, for people and for bug reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tabulate import tabulate

from xtrain import registry
from xtrain.contract import JSON, Availability
from xtrain.errors import BackendError
from xtrain.measure.machine import environment
from xtrain.printable import printable
from xtrain.records.summary import format_bytes

if TYPE_CHECKING:
    from xtrain.gradcheck import GradCheck

NOT_INSTALLED = "not installed"
BYTES = ", bytes"
SHOWN_PARAMETERS = 10


@dataclass(frozen=True)
class Patient:
    """A backend: usable here or not, and what it says of this machine."""

    available: Availability
    facts: Mapping[str, JSON]


@dataclass(frozen=True)
class Diagnosis:
    environment: Mapping[str, JSON]
    backends: Mapping[str, Patient]

    def as_json(self) -> dict[str, JSON]:
        backends: dict[str, JSON] = {
            name: {"usable": one.available.usable, "reason": one.available.reason, "facts": one.facts}
            for name, one in self.backends.items()
        }
        return {"environment": self.environment, "backends": backends}


def diagnose() -> Diagnosis:
    """Look at everything; starts nothing."""
    return Diagnosis(
        environment(),
        {name: Patient(found, _facts(name, found)) for name, found in registry.survey().items()},
    )


def _facts(name: str, found: Availability) -> Mapping[str, JSON]:
    try:
        return registry.load(name).facts() if found.usable else {}
    except BackendError:
        return {}


def render(diagnosis: Diagnosis) -> str:
    """A section for the machine and one for each backend."""
    machine = dict(diagnosis.environment)
    packages = machine.pop("packages")
    assert isinstance(packages, Mapping)
    rows = [("machine", ""), *_rows(machine)]
    rows += [("packages", ""), *_rows({name: packages[name] or NOT_INSTALLED for name in packages})]
    for name, patient in diagnosis.backends.items():
        usable = "usable" if patient.available.usable else "not usable"
        rows += [(name, f"{usable}: {patient.available.reason}"), *_rows(patient.facts)]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _rows(facts: Mapping[str, JSON]) -> list[tuple[str, str]]:
    return [(f"  {_label(name)}", _value(name, value)) for name, value in facts.items()]


def _label(name: str) -> str:
    return name.removesuffix(BYTES).removesuffix("_bytes").replace("_", " ") if name.islower() else name


def _value(name: str, value: JSON) -> str:
    if value is None:
        return "not set" if name.isupper() else "unknown"
    if isinstance(value, int) and name.endswith((BYTES, "_bytes")):
        return format_bytes(value)
    return printable(str(value))


def grad_check_json(check: GradCheck) -> dict[str, JSON]:
    """`inf` is a string here: JSON has no such number."""
    return {
        "backend": check.backend,
        "right": check.right,
        "loss": check.loss,
        "expected_loss": check.expected_loss,
        "tolerance": check.tolerance,
        "parameters": [{**asdict(one), "error": _finite(one.error)} for one in check.parameters],
    }


def _finite(error: float) -> float | str:
    return error if error != float("inf") else "inf"


def render_grad_check(check: GradCheck) -> str:
    """The worst parameters and the verdict."""
    shown = check.parameters[:SHOWN_PARAMETERS]
    rows = [
        (one.name, f"{one.norm:.3e}", f"{one.error:.1e}", "wrong" if one in check.wrong else "right")
        for one in shown
    ]
    table = tabulate(
        rows,
        headers=["parameter", "gradient norm", "relative error", ""],
        tablefmt="simple",
        disable_numparse=True,
    )
    left = len(check.parameters) - len(shown)
    more = f"\n... and {left} more, each with a smaller error" if left > 0 else ""
    return f"{table}{more}\n\n{_verdict(check)}"


def _verdict(check: GradCheck) -> str:
    head = f"{check.backend} ({check.reason}), {check.model}: "
    losses = f"loss {check.loss:.6f}, in bare torch on the CPU {check.expected_loss:.6f}"
    if check.right:
        worst = check.parameters[0].error
        return f"{head}gradients are right (largest relative error {worst:.1e}); {losses}"
    wrong = len(check.wrong)
    return (
        f"{head}WRONG: {wrong} of {len(check.parameters)} gradients differ by more than "
        f"{check.tolerance:g}; {losses}. Do not train this model here: see what docs/doctor.md says"
    )
