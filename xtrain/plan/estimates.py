"""`xtrain plan --formula`: one estimate, asked for by name and printed."""

from __future__ import annotations

from difflib import get_close_matches

from tabulate import tabulate

from xtrain.errors import RequestError
from xtrain.plan.formulas import FORMULAS, Estimate, Sizes

DIVISORS = {"GB": 1e9, "GiB": float(1 << 30), "x": 1.0}


def estimate(name: str, **sizes: float) -> Estimate:
    """Raises RequestError for a name that is none, or sizes that are no sizes."""
    if name not in FORMULAS:
        near = get_close_matches(name, FORMULAS, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise RequestError(f"--formula: found {name}, expected one of {', '.join(FORMULAS)}{hint}")
    if not 0 < sizes["params"] < float("inf"):
        raise RequestError(f"--params: found {sizes['params']:g}, expected a number above 0, such as 7e9")
    return FORMULAS[name](Sizes(**sizes))  # type: ignore[arg-type]


def render(found: Estimate) -> str:
    """The table, in its unit, and what it counts below."""
    divisor = DIVISORS[found.unit]
    rows = [[name, *(f"{value / divisor:,.2f}" for value in row)] for name, row in found.rows.items()]
    table = tabulate(
        rows, headers=["", *found.columns], tablefmt="simple", disable_numparse=True, stralign="right"
    )
    unit = "" if found.unit == "x" else f", {found.unit}"
    return "\n".join([f"{found.title}{unit}", "", table, "", *(f"- {note}" for note in found.notes)])
