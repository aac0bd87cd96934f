"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from xtrain.contract import MEMORY_CATEGORIES
from xtrain.plan.answer import NO_SLACK, Plan, first_fit
from xtrain.plan.ladder import USABLE, Rung
from xtrain.records.summary import format_bytes, plural

SLACK = (
    "Bytes of live tensors. On top come kernels' workspace, the runtime and the allocator's slack, which is "
    f"not predicted: {NO_SLACK}."
)


def render_plan(plan: Plan, world: int, backend: str) -> str:
    """Categories at the peak and at rest, then each table with what fits."""
    several = f" on {plural(world, 'process')}, per process" if world > 1 else ""
    parts = [
        f"{plan.model}: {plan.parameters:,} parameters, accumulation {plan.accumulation}, {backend}{several}",
        *(_place(plan, place) for place in plan.own.places),
        *([f"This spec {_verdict(plan.own, False)}: {FITS}."] if plan.own.fits is not None else []),
        "The ladder: each rung with those above it.",
        table(_rungs(plan.rungs), ["", "peak", "at", "on the host", ""]),
    ]
    if plan.auto:
        parts += [AUTO, table(_rungs(plan.auto), ["memory: auto", "peak", "at", "on the host", ""])]
    if plan.stages:
        parts += ["Sharded over the processes, per process.", table(_stages(plan), STAGE_HEADERS)]
    if plan.largest_micro is not None:
        parts.append(f"Largest batch.micro that fits: {plan.largest_micro or 'none, not even 1'}")
    return "\n\n".join([*parts, *plan.notes, SLACK])


FITS = f"what fits takes at most {USABLE:.0%} of a device"
AUTO = (
    f"In this order a run tries the techniques, and begins with the first that takes at most {USABLE:.0%} of "
    "its device; with the last where none does."
)
STAGE_HEADERS = ["memory.sharding", "peak", "at", "", "sent per step"]


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def _place(plan: Plan, place: str) -> str:
    """What one place holds: at its peak, and at home also between steps."""
    height = plan.own.places[place]
    rest = plan.rest if place == plan.own.home else {}
    shown = [name for name in MEMORY_CATEGORIES if height.bytes[name] or rest.get(name)]
    rows = [(name, format_bytes(height.bytes[name]), format_bytes(rest.get(name, 0))) for name in shown]
    rows.append(("total", format_bytes(height.total), format_bytes(sum(rest.values()))))
    headers = [place, f"at the peak ({height.name})", "between steps"]
    return table(rows, headers) if rest else table([row[:2] for row in rows], headers[:2])


def _rungs(rungs: Sequence[Rung]) -> list[tuple[str, ...]]:
    """The first that fits is marked."""
    first = first_fit(rungs)
    return [
        (
            rung.name,
            format_bytes(rung.peak.total),
            rung.peak.name,
            _elsewhere(rung),
            _verdict(rung, rung is first),
        )
        for rung in rungs
    ]


def _elsewhere(rung: Rung) -> str:
    held = sum(height.total for place, height in rung.places.items() if place != rung.home)
    return format_bytes(held) if held else ""


def _verdict(rung: Rung, is_first: bool) -> str:
    if rung.fits is None:
        return ""
    return ("fits: the first" if is_first else "fits") if rung.fits else "does not fit"


def _stages(plan: Plan) -> list[tuple[str, ...]]:
    return [
        (
            rung.name,
            format_bytes(rung.peak.total),
            rung.peak.name,
            _verdict(rung, False),
            format_bytes(rung.sent_bytes),
        )
        for rung in plan.stages
    ]
