"""What the verdicts are put together from."""

from __future__ import annotations

from collections.abc import Sequence

from xtrain.report.comparison import Tone, Topic, Verdict


def verdict(topic: Topic, tone: Tone, headline: str, details: Sequence[str]) -> Verdict:
    return Verdict(topic=topic, tone=tone, headline=headline, details=list(details))


def listed(names: Sequence[str]) -> str:
    """`a, b and c`; at least one."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def either(names: Sequence[str]) -> str:
    """`a, b or c`; at least one."""
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
