"""Before anything is built: do all processes of a job mean the same run, on the same software, and do they
reach each other? What differs is told with the host it differs on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from xtrain.contract import Job
from xtrain.errors import EXIT_REQUEST, RequestError, RunFailed, XtrainError
from xtrain.measure.machine import RECORDED_PACKAGES, package_version
from xtrain.spec import dump_spec
from xtrain.spec.tree import Spec

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

ADDRESS = "XTRAIN_ADDRESS"
"""This host's address among the hosts of a run, where one was given."""
CLOCK_SECONDS = 5.0
"""Clocks further apart are told. Nothing in training reads them, so they are no reason to stop."""
LOOK_SECONDS = 0.05
TELL_SECONDS = 10.0
LONGEST_SECONDS = 86_400.0
"""Waited for the others where no limit is set."""


@dataclass(frozen=True)
class Facts:
    """What one process is about to do; `checked` has to be equal on all."""

    rank: int
    host: str
    checked: dict[str, str]
    """By what it is called."""


def known(job: Job, spec: Spec, data_hash: str) -> Facts:
    """By this process."""
    text = json.dumps(dump_spec(spec), sort_keys=True)
    checked = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: package_version(name) or "not installed" for name in RECORDED_PACKAGES},
        "spec": f"hash {hashlib.sha256(text.encode()).hexdigest()[:12]}",
        "data": f"hash {data_hash.removeprefix('sampled:')[:12]}",
    }
    return Facts(job.rank, host_name(), checked)


def host_name() -> str:
    """What this host is called in messages."""
    return os.environ.get(ADDRESS) or platform.node()


def preflight(
    job: Job,
    facts: Facts,
    timeout_seconds: float | None,
    say: Callable[[str], None],
    now: Callable[[], float] = time.time,
) -> None:
    """Compare facts with all other processes and add something up with them. Collective.

    Raises RequestError naming the hosts that differ from most, or from rank 0 where it is a draw; RunFailed
    when a process failed before, did not come within `timeout_seconds`, or cannot be reached.
    """
    meeting = Meeting(job, timeout_seconds or LONGEST_SECONDS)
    everybody = [Facts(**one) for one in meeting.exchange("facts", asdict(facts))]
    if odd := differences(everybody):
        listed = "\n  ".join(odd)
        raise RequestError(f"the processes of this job differ, nothing was started:\n  {listed}")
    meeting.add_up()
    for note in clock_notes(everybody, meeting.exchange("clock", now())):
        say(f"note: {note}")


def everyones(job: Job, topic: str, value: Any, timeout_seconds: float | None) -> list[Any]:
    """What each process has to say about `topic`, by rank. Collective."""
    return Meeting(job, timeout_seconds or LONGEST_SECONDS).exchange(topic, value)


def differences(everybody: Sequence[Facts]) -> list[str]:
    """A line for each fact that is not the same everywhere."""
    return [line for name in everybody[0].checked for line in _difference(name, everybody)]


def _difference(name: str, everybody: Sequence[Facts]) -> Iterator[str]:
    values = Counter(one.checked.get(name, "unknown") for one in everybody)
    usual = values.most_common(1)[0][0]  # of equally many, the one met first: rank 0's
    for value in values:
        if value != usual:
            odd = [one for one in everybody if one.checked.get(name, "unknown") == value]
            yield f"{name}: {value} on {_who(odd)}, {usual} on the others"


def clock_notes(everybody: Sequence[Facts], clocks: Sequence[float]) -> list[str]:
    """What to say of clocks, read at one moment, that are not those of most hosts."""
    usual = sorted(clocks)[(len(clocks) - 1) // 2]
    return [
        f"the clock of {_who([one])} is {abs(clock - usual):.0f} s "
        f"{'ahead of' if clock > usual else 'behind'} the others; training does not mind, readers of logs do"
        for one, clock in zip(everybody, clocks, strict=True)
        if abs(clock - usual) > CLOCK_SECONDS
    ]


def _who(some: Sequence[Facts]) -> str:
    """Hosts with their ranks: gpu2 (ranks 4, 5)."""
    hosts: dict[str, list[str]] = {}
    for one in some:
        hosts.setdefault(one.host, []).append(str(one.rank))
    return " and ".join(
        f"{host} (rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)})" for host, ranks in hosts.items()
    )


@contextmanager
def told_to_others(job: Job | None) -> Iterator[None]:
    """An error before the preflight is told to the other processes, which would wait for this one."""
    try:
        yield
    except XtrainError as error:
        if job is not None and job.world > 1:
            with suppress(Exception):  # they may be gone, or not there yet: then they find out by waiting
                Meeting(job, TELL_SECONDS).tell_failure(error)
        raise


class Meeting:
    """Where the processes of a job exchange notes before an engine has joined them."""

    _kept: Store | None = None
    """Rank 0 may serve the notes: it has to stay for those who read later."""

    def __init__(self, job: Job, timeout_seconds: float) -> None:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        self._job = job
        self._seconds = timeout_seconds
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._serves = job.rank == 0 and not served_by_agent
        if Meeting._kept is None:
            try:
                Meeting._kept = TCPStore(
                    address,
                    port,
                    is_master=self._serves,
                    timeout=timedelta(seconds=timeout_seconds),
                    wait_for_workers=False,
                    multi_tenant=True,  # the engine will ask for the same one
                )
            except RuntimeError as error:
                raise RunFailed(
                    f"rank {job.rank} on {host_name()} cannot reach {address}:{port}: {_first(error)}"
                ) from error
        # An agent's store outlives the workers of an attempt. (Where it does not, the count says nothing:
        # after a restart the agents of two hosts need not have the same.)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if served_by_agent else "0"
        self._store = PrefixStore(f"xtrain/{attempt}", Meeting._kept)

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """What each process has to say, by rank."""
        try:
            self._store.set(f"{topic}/{self._job.rank}", json.dumps(value))
            self._store.add(topic, 1)
            self._wait_for_all(topic)
            said = self._store.multi_get([f"{topic}/{rank}" for rank in self._ranks()])
            self._store.add(f"{topic}/read", 1)
            self._stay_for_readers(topic)
        except RuntimeError as error:
            raise RunFailed(f"rank 0 is gone before training began: {_first(error)}") from error
        return [json.loads(one) for one in said]

    def _wait_for_all(self, topic: str) -> None:
        deadline = time.monotonic() + self._seconds
        while (came := self._store.add(topic, 0)) < self._job.world:
            if self._store.check(["failed"]):
                code, message = json.loads(self._store.get("failed"))
                raise (RequestError if code == EXIT_REQUEST else RunFailed)(message)
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{came} of {self._job.world} processes came within {self._seconds:.0f} s; missing: rank "
                    + ", ".join(str(r) for r in self._ranks() if not self._store.check([f"{topic}/{r}"]))
                )
            time.sleep(LOOK_SECONDS)

    def _stay_for_readers(self, topic: str) -> None:
        """Who serves the notes may end next, because of what was said: not before the others know it too."""
        deadline = time.monotonic() + TELL_SECONDS
        while self._serves and self._store.add(f"{topic}/read", 0) < self._job.world:
            if time.monotonic() > deadline:
                return
            time.sleep(LOOK_SECONDS)

    def _ranks(self) -> range:
        return range(self._job.world)

    def tell_failure(self, error: XtrainError) -> None:
        message = f"rank {self._job.rank} on {host_name()} did not begin: {error}"
        self._store.set("failed", json.dumps([error.exit_code, message]))

    def add_up(self) -> None:
        """The all-reduce that every step needs, on its own: what fails here is the network.

        By gloo, on the CPU and the hosts' network. What the engine uses between GPUs is not tried here.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        total = torch.tensor(float(self._job.rank))
        try:
            dist.init_process_group(
                store=PrefixStore("add-up", self._store),
                rank=self._job.rank,
                world_size=self._job.world,
                timeout=timedelta(seconds=self._seconds),
            )
            dist.all_reduce(total)
            dist.destroy_process_group()
        except RuntimeError as error:
            raise RunFailed(
                f"rank {self._job.rank} on {host_name()} cannot add up numbers with the others: "
                f"{_first(error)}; is the right network interface chosen, and open between the hosts?"
            ) from error
        if total.item() != sum(self._ranks()):
            raise RunFailed(f"the ranks add up to {total.item():.0f}, expected {sum(self._ranks())}")


def _first(error: Exception) -> str:
    """The first line of a library's message."""
    return (str(error) or type(error).__name__).splitlines()[0]
