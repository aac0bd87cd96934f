"""When a watchdog ends its process, and with which word; os._exit is what it must not do to the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Event

import pytest

from xtrain.launching.watchdog import Patience, Watchdog

SHORT = 0.01
LONG_SECONDS = 30.0


class Ended:
    """How it ended: the exit code, what was said, and whether it had been asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.happened, self.left = Event(), Event()
        self.words: list[tuple[str, bool]] = []
        self.code: int | None = None
        monkeypatch.setattr(os, "_exit", self._exit)

    def leave(self, reason: str, asked: bool) -> int:
        self.words.append((reason, asked))
        return 75 if asked else 1

    def _exit(self, code: int) -> None:
        self.code = code
        self.happened.set()
        assert self.left.wait(LONG_SECONDS)  # nothing comes after an exit

    def under(self, patience: Patience, asked: Callable[[], bool] = lambda: False) -> tuple[int | None, str]:
        with Watchdog(patience, "rank 0 of 1 on here", asked, self.leave):
            assert self.happened.wait(LONG_SECONDS)
        self.left.set()
        ((said, _),) = self.words
        return self.code, said


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Ended:
    return Ended(monkeypatch)


def test_a_process_without_a_step_fails(ended: Ended, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = ended.under(Patience(step_seconds=SHORT))
    assert code == 1
    assert said.startswith("no step for 0.01 s (launch.hang_minutes): the stacks above show")
    assert "rank 0 of 1 on here stands here:\n" in capfd.readouterr().err


def test_a_process_that_was_asked_to_stop_leaves_when_its_grace_is_over(ended: Ended) -> None:
    code, said = ended.under(Patience(grace_seconds=SHORT), lambda: True)
    assert code == 75
    assert said.startswith("not saved 0.01 s after it was asked to stop (launch.grace_seconds): the stacks")


def test_grace_counts_from_when_it_was_asked(ended: Ended) -> None:
    looks: list[bool] = []

    def asked() -> bool:
        looks.append(len(looks) >= 20)
        return looks[-1]

    assert ended.under(Patience(LONG_SECONDS, SHORT), asked)[0] == 75
    assert looks.index(True) == 20
    assert ended.words[0][1]


def test_grace_does_not_make_a_hang_wait_longer(ended: Ended) -> None:
    assert ended.under(Patience(SHORT, LONG_SECONDS), lambda: True)[0] == 1
