"""A comparison as files: report.json, report.md, and report.html where the charts' library is installed."""

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
        try:
            write_text(out / "report.html", render_page(comparison, chart_library()))
        except LibraryMissing as missing:
            print(f"note: no {out / 'report.html'}: {missing}", file=sys.stderr, flush=True)
    except OSError as error:
        raise RequestError(f"cannot write the report in {out}: {error.strerror}") from error
