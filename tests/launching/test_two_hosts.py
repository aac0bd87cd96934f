"""Two hosts, each with one process, train as one host with two does; also when something dies on the way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conformance.cases import Case
from tests.conformance.conftest import run_in
from tests.small_runs import SPEC, metrics, steps
from tests.started import ENDLESS, Started, nobody_is_left, starting  # noqa: F401
from tests.two_hosts import TwoHosts, two_hosts
from xtrain.request import this_program

pytestmark = pytest.mark.slow

STEPS = 40
ZERO_3: dict[str, Any] = {
    **yaml.safe_load(SPEC),
    "optimizer": {"name": "adamw", "lr": 2e-3},
    "data": {"source": "synthetic", "seq_len": 64, "tokens": 20_000},
    "batch": {"global": 16, "micro": 2},
    "train": {"steps": STEPS},
    "memory": {"sharding": "parameters"},
    "log": {"every_steps": 1},
}
"""Its steps are slow, so that a signal in the middle comes in the middle."""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path) as up:
        yield up


def launched(start: Callable[..., Started], folder: Path, hosts: TwoHosts, words: Sequence[str]) -> Started:
    """`xtrain launch` of ZERO_3, with a stand-in for ssh."""
    (folder / "spec.yaml").write_text(yaml.safe_dump(ZERO_3))
    (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    out = folder / "out"
    command = [*this_program(), "launch", str(folder / "spec.yaml"), "--hosts", str(folder / "hosts")]
    return start([*command, "--ssh", str(hosts.enter), *words, "--out", str(out)], out)


def worker_on(hosts: TwoHosts, address: str) -> psutil.Process:
    (worker,) = [
        process
        for process in map(psutil.Process, hosts.processes(address))
        if "xtrain.launching.worker" in process.cmdline()
    ]
    return worker


def losses(out: Path) -> list[float | None]:
    return [record.loss for record in metrics(out)]


def test_two_hosts_give_the_losses_of_one_although_a_worker_dies_in_the_middle(
    start: Callable[..., Started], tmp_path: Path, hosts: TwoHosts
) -> None:
    one = launched(start, tmp_path, hosts, ["--backend", "deepspeed", "--max-restarts", "1"])
    one.wait_for(f"step 10/{STEPS}")
    worker_on(hosts, hosts.addresses[1]).send_signal(signal.SIGKILL)
    assert one.ended() == 0, one.said()
    assert "note: rank 1 failed: it died without a word" in one.said()
    assert "resumed from" in one.said()
    assert nobody_is_left(one)
    assert steps(one.out) == list(range(1, STEPS + 1))
    reference, _ = run_in(tmp_path, [Case("one host", "deepspeed", ZERO_3)], 2)
    assert losses(one.out) == pytest.approx(reference["one host"]["losses"], rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "patience"),
    [(TwoHosts.kill, []), (TwoHosts.lose, ["--set=launch.hang_minutes=0.05"])],
    ids=["died", "silent"],
)
def test_losing_the_host_where_all_meet_ends_the_other_with_75_and_the_command_that_goes_on(
    start: Callable[..., Started],
    tmp_path: Path,
    hosts: TwoHosts,
    loss: Callable[[TwoHosts, str], None],
    patience: list[str],
) -> None:
    first, second = hosts.addresses
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(ZERO_3))
    out = tmp_path / "out"

    def on(address: str) -> Started:
        place = ["--nodes", "2", "--meet", f"{first}:29411", "--id", "test", "--address", address]
        run = [*this_program(), "run", str(tmp_path / "spec.yaml"), "--backend", "deepspeed", *ENDLESS]
        words = [*run, *patience, "--nproc", "2", *place, "--out", str(out)]
        return start(["ip", "netns", "exec", hosts.namespaces[address], *words], out)

    one, other = on(first), on(second)
    one.wait_for("step 6/")
    loss(hosts, first)
    assert other.ended() == 75, other.said()
    assert f"{first}:29411 does not answer: the host that all others meet at is lost" in other.said()
    last = other.said().splitlines()[-1]
    assert last.startswith("go on with: ")
    assert f"--address {second}" in last
    assert last.endswith(f"--resume {out}") or f"--resume {out} " in last
    assert nobody_is_left(other)


def test_an_odd_spec_on_one_host_is_refused_before_anything_begins_and_the_host_is_named(
    start: Callable[..., Started], tmp_path: Path, hosts: TwoHosts
) -> None:
    first, second = hosts.addresses
    out = tmp_path / "out"
    started = []
    for address, rate in ((first, "2e-3"), (second, "1e-3")):
        (tmp_path / f"{address}.yaml").write_text(SPEC.replace("2e-3", rate))
        place = ["--nodes", "2", "--meet", f"{first}:29412", "--id", "test", "--address", address]
        words = ["run", str(tmp_path / f"{address}.yaml"), "--backend", "deepspeed", "--nproc", "2", *place]
        command = [*this_program(), *words, "--out", str(out)]
        started.append(start(["ip", "netns", "exec", hosts.namespaces[address], *command], out))
    for one in started:
        assert one.ended() == 2, one.said()
        assert "the processes of this job differ, nothing was started:" in one.said()
        assert f" on {second} (rank 1), hash " in one.said()
    assert not out.exists()


def test_namespaces_are_gone_afterwards(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts:
        names = list(hosts.namespaces.values())
        assert all((Path("/run/netns") / name).exists() for name in names)
    assert not any((Path("/run/netns") / name).exists() for name in names)
