"""What the pages of results have in common: how they begin, and the command that made them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any


def command_of(program: str) -> str:
    """The command that runs now, without the folder it writes to, which is nobody else's."""
    words = zip(sys.argv, sys.argv[1:], strict=False)
    kept = [word for before, word in words if before != "--out" and not re.match("--out(=|$)", word)]
    return " ".join(["python -m", f"benchmarks.{program}", *kept])


def head(title: str, method: str, report: Mapping[str, Any]) -> list[str]:
    """Title, method, a remark if there is one; machine, versions and command: all of it from the JSON."""
    machine = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    remark = [f"**{report['remark']}**", ""] if report.get("remark") else []
    return [
        f"# {title}, {report['date']}",
        "",
        method,
        *remark,
        f"- Machine: {machine['cpu']}, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['platform']}; "
        f"{report['threads']} threads",
        f"- Versions: Python {machine['python']}, {versions}; commit {machine['git_commit']}",
        f"- Command: `{report['command']}`",
    ]
