"""What the verdicts are put together from."""

from __future__ import annotations

from collections.abc import Sequence

from xtrain.report.comparison import Tone, Topic, Verdict


def verdict(topic: Topic, tone: Tone, headline: str, details: Sequence[str]) -> Verdict:
    return Verdict(topic=topic, tone=tone, headline=headline, details=list(details))


def numbered(names: Sequence[str]) -> list[str]:
    """The same in order, all unlike: one that stood before gets a number."""
    found: list[str] = []
    for name in names:
        unlike, count = name, 1
        while unlike in found:
            count += 1
            unlike = f"{name} ~{count}"
        found.append(unlike)
    return found


def listed(names: Sequence[str]) -> str:
    """`a, b and c`; at least one."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def either(names: Sequence[str]) -> str:
    """`a, b or c`; at least one."""
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
