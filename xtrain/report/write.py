"""A comparison as files: report.json, report.md and report.html."""

from __future__ import annotations

import sys
from pathlib import Path

from xtrain.errors import RequestError
from xtrain.records.rundir import write_json, write_text
from xtrain.report.comparison import Comparison
from xtrain.report.page import LibraryMissing, chart_library, render_page
from xtrain.report.text import render_markdown


def write_report(out: Path, comparison: Comparison) -> None:
    """Into the existing folder `out`; what was there is replaced."""
    try:
        write_json(out / "report.json", comparison.model_dump(mode="json"))
        write_text(out / "report.md", render_markdown(comparison))
        _write_page(out / "report.html", comparison)
    except OSError as error:
        raise RequestError(f"cannot write the report in {out}: {error.strerror}") from error


def _write_page(file: Path, comparison: Comparison) -> None:
    """Without the charts' library there is no page, not an old one either: the other two files are of now."""
    try:
        library = chart_library()
    except LibraryMissing as missing:
        file.unlink(missing_ok=True)
        print(f"note: no {file}: {missing}", file=sys.stderr, flush=True)
        return
    write_text(file, render_page(comparison, library))
