"""`xtrain plan`: a question from the command line, and its answer as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from tabulate import tabulate

from xtrain.errors import RequestError
from xtrain.plan.advice import Advice, Cluster, Shape, advise
from xtrain.plan.answer import make_plan
from xtrain.plan.formulas import FORMULAS, Estimate, Sizes
from xtrain.plan.layout import DEVICE
from xtrain.plan.models import planned_model
from xtrain.plan.notes import plan_notes
from xtrain.plan.render import render_plan
from xtrain.plan.saves import save_notes
from xtrain.plan.subject import subject_of
from xtrain.spec import load_spec

DIVISORS = {"GB": 1e9, "GiB": float(1 << 30)}
MOST = 1e18
"""Of parameters, or of a device's bytes: far beyond what there is, and no figure becomes infinite."""
UNITS = {
    "GB": 1e9,
    "GIB": float(1 << 30),
    "MB": 1e6,
    "MIB": float(1 << 20),
    "TB": 1e12,
    "TIB": float(1 << 40),
}


def answer_spec(
    path: Path,
    overrides: Sequence[str],
    world: int | None,
    backend: str | None,
    device_memory: str | None,
    as_json: bool,
) -> str:
    """The plan of a spec on `world` processes (default: launch.processes), as text."""
    device_bytes = parse_bytes(device_memory) if device_memory is not None else None
    spec = load_spec(path, overrides, world)
    processes = world or spec.launch.processes
    named = subject_of(spec, processes, backend, device_bytes)
    plan = make_plan(named.subject, named.model, named.auto, [*plan_notes(spec)])
    plan = replace(plan, notes=(*plan.notes, *save_notes(spec, plan.parameters, processes)))
    return json.dumps(plan.as_json(), indent=2) if as_json else render_plan(plan, processes, named.backend)


def answer(
    formula: str | None,
    as_json: bool,
    *,
    params: float,
    gpus: int,
    nodes: int,
    device_memory: str,
    batch: int,
    seq: int,
    hidden: int,
    layers: int,
    heads: int,
    bytes_: str,
) -> str:
    """Of a formula, or without one the advice; RequestError for a question that is none."""
    if not 0 < params <= MOST:
        raise RequestError(
            f"--params: found {params:g}, expected a number above 0 and up to {MOST:g}, such as 7e9"
        )
    if formula is None:
        cluster = Cluster(nodes, gpus, parse_bytes(device_memory))
        return _told(advise(Shape(params, layers, hidden, seq, batch), cluster), as_json)
    sizes = Sizes(params, gpus * nodes, batch, seq, hidden, layers, heads, int(bytes_))
    return _told(_formula(formula)(sizes), as_json)


def advise_spec(
    path: Path, overrides: Sequence[str], as_json: bool, *, gpus: int, nodes: int, device_memory: str
) -> str:
    """How to divide the model of a spec, at its length of sequences and its micro-batch."""
    spec = load_spec(path, overrides)
    model = planned_model(spec, DEVICE).bytes(spec)
    shape = Shape(model.parameters, model.layers, model.hidden, spec.data.seq_len, spec.micro_batch)
    return _told(advise(shape, Cluster(nodes, gpus, parse_bytes(device_memory))), as_json)


def _told(found: Advice | Estimate, as_json: bool) -> str:
    if as_json:
        return json.dumps(found.as_json(), indent=2)
    return render_advice(found) if isinstance(found, Advice) else render_estimate(found)


def _formula(name: str) -> Callable[[Sizes], Estimate]:
    if name in FORMULAS:
        return FORMULAS[name]
    near = get_close_matches(name, FORMULAS, n=1)
    hint = f"; nearest: {near[0]}" if near else ""
    raise RequestError(f"--formula: found {name}, expected one of {', '.join(FORMULAS)}{hint}")


def parse_bytes(text: str) -> float:
    """ "24GiB" -> 24 x 2^30."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    found = float(match[1]) * UNITS.get(match[2].upper(), 0.0) if match else 0.0
    if not 0 < found <= MOST:
        raise RequestError(f"--device-memory: found {text!r}, expected a size such as 24GiB or 80GB")
    return found


def render_estimate(found: Estimate) -> str:
    """The table, in its unit, and what it counts below."""
    divisor = DIVISORS[found.unit]
    rows = [[name, *(f"{value / divisor:,.2f}" for value in row)] for name, row in found.rows.items()]
    table = tabulate(
        rows, headers=["", *found.columns], tablefmt="simple", disable_numparse=True, stralign="right"
    )
    return "\n".join([f"{found.title}, {found.unit}", "", table, "", *(f"- {note}" for note in found.notes)])


def render_advice(found: Advice) -> str:
    """Degrees first, then the reasons in the order they were asked, then the arithmetic."""
    figures = tabulate(list(found.figures.items()), tablefmt="plain", disable_numparse=True)
    reasons = [f"- {reason}" for reason in found.reasons]
    return "\n".join([f"{found.degrees}, sharding: {found.zero}", "", *reasons, "", figures])
