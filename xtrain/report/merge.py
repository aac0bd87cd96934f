"""`xtrain report`: finished runs, wherever they were made, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xtrain.errors import RequestError
from xtrain.records.summary import plural
from xtrain.report.build import compare_lanes
from xtrain.report.comparison import Comparison
from xtrain.report.places import stored_lanes
from xtrain.report.write import write_report


def merge(places: Sequence[str], out: Path) -> Comparison:
    """Of `[NAME=]PATH`s; the report goes to `out`, a folder that is made where it is missing.

    Raises RequestError, naming the file, for a record that is none: then nothing is written.
    """
    lanes = stored_lanes(places)
    comparison = compare_lanes(f"{plural(len(lanes), 'lane')} side by side", lanes)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot create {out}: {error.strerror}") from error
    write_report(out, comparison)
    return comparison
