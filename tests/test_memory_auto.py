"""`memory: auto`: what a run begins with, and how it goes on with less when the device is full."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain.run
import xtrain.work
from tests.clean_process import start
from tests.simulated.backend import Simulated, _devices, simulated_backend
from tests.simulated.counting import MEMORY
from tests.small_runs import metrics, steps
from tests.workers.hungry import COUNTER
from xtrain import registry
from xtrain.choose import Choice
from xtrain.contract import Job, Memory, OutOfMemory, Resolved
from xtrain.errors import EXIT_DONE, EXIT_FAILED, RunFailed
from xtrain.fitting import HISTORY, Failure, add_failure, fit, lower_after, read_history
from xtrain.launching.launch import Ended
from xtrain.measure import cgroup
from xtrain.plan.auto import Rung, predicted_bytes, rungs, sized
from xtrain.prepare import RUN_DIRECTORY
from xtrain.records.record import RunRecord, load_record
from xtrain.records.rundir import write_json
from xtrain.request import Request
from xtrain.run import run
from xtrain.signals import StopRequest
from xtrain.spec import load_spec
from xtrain.spec.tree import MemorySection, Spec
from xtrain.work import work

SPEC = """\
model: {preset: gpt2-nano, layers: 2, hidden: 64, heads: 2, positions: 64}
data: {source: synthetic, seq_len: 64, tokens: 40_000}
batch: {global: 8, micro: 8}
train: {steps: 6}
optimizer: {name: adamw, lr: 2e-3}
memory: auto
"""
TOLERANCE = 1e-5
PLAIN = "memory={}"


def spec_of(tmp_path: Path, *overrides: str) -> Spec:
    (tmp_path / "spec.yaml").write_text(SPEC)
    return load_spec(tmp_path / "spec.yaml", overrides)


def names(spec: Spec, backend: str, world: int = 1) -> list[str]:
    return [rung.name for rung in rungs(spec, world, registry.load(backend))]


def test_the_ladder_halves_the_micro_batch_then_recomputes_then_offloads(tmp_path: Path) -> None:
    assert names(spec_of(tmp_path), "cuda") == [
        "the spec as it is",
        "batch.micro 4",
        "batch.micro 2",
        "batch.micro 1",
        "memory.checkpointing auto",
        "memory.checkpointing {every: 1}",
        "memory.offload optimizer and gradients",
        "memory.offload activations too",
        "memory.sharding parameters",
    ]


def test_what_does_nothing_on_a_backend_is_no_rung(tmp_path: Path) -> None:
    found = names(spec_of(tmp_path), "cpu")
    assert not [name for name in found if "offload" in name or "sharding" in name]


@pytest.mark.parametrize("sees_gpu", [True, False])
def test_deepspeed_is_asked_whether_there_is_a_device_to_offload_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees_gpu: bool
) -> None:
    files = (str(tmp_path),) if sees_gpu else ()
    monkeypatch.setattr("xtrain.backends.deepspeed.environment.GPU_FILES", files)
    several = names(spec_of(tmp_path, "batch.micro=4"), "deepspeed", 2)
    assert "memory.sharding gradients" in several
    offloaded = ["memory.offload optimizer and gradients", "memory.offload activations too"]
    assert [name for name in several if "offload" in name] == (offloaded if sees_gpu else [])


def test_each_rung_is_the_same_training(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    for rung in rungs(spec, 1, registry.load("cuda")):
        same = {"memory": spec.memory, "batch": spec.batch}
        assert rung.spec.batch.global_ == spec.batch.global_
        assert rung.spec.model_copy(update=same) == spec


def needed_bytes(spec: Spec, name: str) -> int | None:
    backend = registry.load(name)
    model = sized(spec, backend)
    assert not isinstance(model, str)
    return predicted_bytes(spec, 1, backend, model)


def test_the_first_rung_that_fits_is_taken(tmp_path: Path) -> None:
    spec, backend = spec_of(tmp_path), registry.load("cuda")
    ladder = rungs(spec, 1, backend)
    needed = [needed_bytes(rung.spec, "cuda") for rung in ladder]
    third = needed[2]
    assert third is not None
    assert fit(spec, 1, backend, int(third / 0.9) + 1, tmp_path).rung == ladder[2]
    assert fit(spec, 1, backend, 1 << 40, tmp_path).rung == ladder[0]
    assert fit(spec, 1, backend, 1, tmp_path).rung == ladder[-1]
    assert fit(spec, 1, backend, None, tmp_path).rung == ladder[0]


def own(tmp_path: Path, function: str) -> Spec:
    preset = "{preset: gpt2-nano, layers: 2, hidden: 64, heads: 2, positions: 64}"
    (tmp_path / "spec.yaml").write_text(
        SPEC.replace(preset, f"{{factory: 'tests.plan.test_traced:{function}'}}")
    )
    return load_spec(tmp_path / "spec.yaml", ("data.seq_len=256",))


def test_a_model_of_one_s_own_is_traced_to_find_the_first_rung_that_fits(tmp_path: Path) -> None:
    spec, backend = own(tmp_path, "build"), registry.load("cpu")
    ladder = rungs(spec, 1, backend)
    first, second = (needed_bytes(rung.spec, "cpu") for rung in ladder[:2])
    assert first is not None
    assert second is not None
    assert second < first
    assert fit(spec, 1, backend, int(second / 0.9) + 1, tmp_path).rung == ladder[1]


def test_a_model_that_cannot_be_traced_begins_with_the_first_rung_and_why_is_told(tmp_path: Path) -> None:
    fitted = fit(own(tmp_path, "build_by_numbers"), 1, registry.load("cpu"), 1, tmp_path)
    assert fitted.rung.name == "the spec as it is"
    assert "what it needs is known only once it runs: " in fitted.reason
    assert "cannot be made without numbers" in fitted.reason


def test_a_rung_that_was_too_much_is_not_tried_again_nor_those_above_it(tmp_path: Path) -> None:
    spec, backend = spec_of(tmp_path), registry.load("cuda")
    add_failure(tmp_path, Failure("batch.micro 4", "full", 3))
    fitted = fit(spec, 1, backend, None, tmp_path)
    assert fitted.rung.name == "batch.micro 2"
    assert "memory: auto: batch.micro 4 was too much: full" in fitted.notes


KILLED = Ended(EXIT_FAILED, "rank 0 was killed by SIGKILL", "yes")


def was_on(folder: Path, rung: str, *lower: str) -> None:
    """What the last attempt wrote down."""
    write_json(folder / HISTORY, {"rung": rung, "lower": lower})


def failed(folder: Path) -> list[str]:
    return [one.rung for one in read_history(folder)]


@pytest.mark.parametrize(
    ("ended", "lower", "again"),
    [
        (KILLED, ["b"], True),
        (replace(KILLED, killed_for_memory="likely"), ["b"], True),
        (replace(KILLED, killed_for_memory="unknown"), ["b"], True),
        (replace(KILLED, killed_for_memory="no"), ["b"], False),
        (KILLED, [], False),
        (Ended(EXIT_FAILED, "the loss is no number"), ["b"], False),
        (Ended(0, ""), ["b"], False),
    ],
)
def test_the_launcher_begins_again_after_a_kill_with_something_less_to_try(
    tmp_path: Path, ended: Ended, lower: list[str], again: bool
) -> None:
    was_on(tmp_path, "a", *lower)
    assert lower_after(ended, tmp_path, 0) is again
    assert failed(tmp_path) == (["a"] if ended.killed_for_memory in ("yes", "likely", "unknown") else [])


def test_the_launcher_begins_again_where_a_worker_left_word(tmp_path: Path) -> None:
    was_on(tmp_path, "a", "b")
    add_failure(tmp_path, Failure("a", "full", None))
    assert lower_after(Ended(EXIT_FAILED, "full"), tmp_path, 0)


def test_kills_before_a_run_has_begun_lead_to_an_end(tmp_path: Path) -> None:
    """Each attempt dies before it has written down which rung it is on."""
    was_on(tmp_path, "a", "b", "c")
    assert [lower_after(KILLED, tmp_path, before) for before in range(4)] == [True, True, False, False]
    assert failed(tmp_path) == ["a", "b", "c"]


def test_a_rung_that_several_processes_found_too_much_is_told_once(tmp_path: Path) -> None:
    for why in ("rank 0 is full", "rank 1 is full"):
        add_failure(tmp_path, Failure("a", why, None))
    assert read_history(tmp_path) == [Failure("a", "rank 0 is full", None)]


def test_a_run_without_memory_auto_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it was under it once: its directory still says so."""
    (tmp_path / "spec.yaml").write_text(SPEC)
    out = tmp_path / "out"
    asked: list[list[str]] = []

    def start_workers(arguments: list[str], *_: Any, **__: Any) -> Ended:
        asked.append(arguments)
        was_on(out, "a", "b")
        return KILLED

    monkeypatch.setattr(xtrain.run, "start_workers", start_workers)
    with pytest.raises(RunFailed, match="was killed"):
        run(Request(tmp_path / "spec.yaml", "cpu", out, overrides=(PLAIN,), max_restarts=1))
    assert len(asked) == 1


class Killed(BaseException):
    """Nothing that is written for errors sees it."""


FULL = OutOfMemory("sim:0", Memory(None, None, None), "start")


@dataclass
class JobOfTwo:
    """What a launch starts: its ranks in turn, in this process, on the null backend.

    While their engines start, `rank` comes to the `end`, in `times` attempts, and the other one misses it.
    Then rank 0 trains, alone.
    """

    monkeypatch: pytest.MonkeyPatch
    rank: int
    end: BaseException
    times: int
    attempts: int = 0

    def start_workers(self, words: list[str], processes: int, environ: dict[str, str], **_: Any) -> Ended:
        self.attempts += 1
        request = Request(Path(words[1]), "null")
        with self.monkeypatch.context() as patch:
            patch.setenv(RUN_DIRECTORY, environ[RUN_DIRECTORY])
            if self.attempts > self.times:
                return ended(request, Job())
            return [ended(request, Job(rank, rank, processes)) for rank in range(processes)][self.rank]

    def start(
        self, honest: Callable[..., Any], backend: Any, resolved: Resolved, model: Any, job: Job
    ) -> Any:
        if self.attempts > self.times:
            return honest(backend, resolved, model, job)
        raise self.end if job.rank == self.rank else RunFailed("the connection is closed")


def ended(request: Request, job: Job) -> Ended:
    """What a launcher learns of a worker."""
    spec, choice = load_spec(request.spec_path), Choice(registry.load("null"), "")
    try:
        with StopRequest() as stop:
            return Ended(work(request, spec, choice, job, stop), "")
    except RunFailed as error:
        return Ended(error.exit_code, str(error))
    except Killed:
        return KILLED


def launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, end: BaseException, times: int
) -> None:
    """A run of SPEC by two processes. What they say to each other beforehand is left out."""
    job, null = JobOfTwo(monkeypatch, rank, end, times), type(registry.load("null"))
    honest = null.start
    monkeypatch.setattr(null, "problems", lambda *_: [])
    monkeypatch.setattr(null, "start", lambda *given: job.start(honest, *given))
    monkeypatch.setattr(xtrain.work, "preflight", lambda *_: None)
    monkeypatch.setattr(xtrain.work, "everyones", lambda job, topic, value, seconds: [value])
    monkeypatch.setattr(xtrain.run, "start_workers", job.start_workers)
    (tmp_path / "spec.yaml").write_text(SPEC.replace("micro: 8", "micro: 4"))
    assert run(Request(tmp_path / "spec.yaml", "null", tmp_path / "out", processes=2)) == EXIT_DONE


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("end", [FULL, Killed()], ids=["full", "killed"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_job_that_ends_while_its_engines_start_begins_again_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, end: BaseException, times: int
) -> None:
    launched(tmp_path, monkeypatch, rank, end, times)
    out = tmp_path / "out"
    settings: Any = load_record(out).settings["memory_auto"]
    assert settings["rung"] == f"batch.micro {4 >> times}"
    assert failed(out) == ["the spec as it is", "batch.micro 2"][:times]
    assert steps(out) == list(range(1, 7))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_does_not_fit_at_all_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    with pytest.raises(RunFailed, match="sim:0 is out of memory before the first step"):
        launched(tmp_path, monkeypatch, rank, FULL, 99)
    assert not (tmp_path / "out").exists()


def train(tmp_path: Path, out: Path, *overrides: str) -> None:
    """A run in this process, as a worker does it."""
    spec = spec_of(tmp_path, *overrides)
    request = Request(tmp_path / "spec.yaml", "cpu", out, overrides=overrides)
    with StopRequest() as stop:
        assert work(request, spec, Choice(registry.load("cpu"), ""), Job(), stop) == 0


def trained(tmp_path: Path, out: Path, *overrides: str) -> RunRecord:
    train(tmp_path, out, *overrides)
    return load_record(out)


def losses(out: Path) -> list[float]:
    return [record.loss for record in metrics(out) if record.loss is not None]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`cpu` computes on the simulated device, whose memory can be limited."""
    with simulated_backend():
        gc.collect()
        monkeypatch.setitem(_devices.DEVICES, "cpu", Simulated)
        yield
        MEMORY[0].limit_bytes = None


@pytest.mark.usefixtures("simulated")
def test_it_fits_where_the_plain_run_dies_with_the_same_losses(tmp_path: Path) -> None:
    trained(tmp_path, tmp_path / "roomy", PLAIN)
    gc.collect()
    needed = needed_bytes(spec_of(tmp_path, PLAIN), "cpu")
    assert needed is not None
    MEMORY[0].limit_bytes = MEMORY[0].live_bytes + int(0.8 * needed)
    with pytest.raises(RunFailed, match="out of memory"):
        trained(tmp_path, tmp_path / "plain", PLAIN)
    gc.collect()
    record = trained(tmp_path, tmp_path / "auto")
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "roomy"), rel=TOLERANCE)
    assert steps(tmp_path / "auto") == list(range(1, 7))
    assert record.status == "done"
    settings: Any = record.settings["memory_auto"]
    assert settings["rung"] != "the spec as it is"
    assert any("memory: auto: trains with" in note for note in record.notes)


@pytest.mark.usefixtures("simulated")
def test_a_device_that_gets_full_in_the_middle_is_left_from_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtrain.loop import Loop

    trained(tmp_path, tmp_path / "roomy", PLAIN)
    honest = Loop._step

    def step(loop: Loop, number: int, *rest: Any) -> None:
        if number == 4 and not read_history(tmp_path / "auto"):
            MEMORY[0].limit_bytes = MEMORY[0].live_bytes + 2**20
        try:
            honest(loop, number, *rest)
        finally:
            MEMORY[0].limit_bytes = None

    monkeypatch.setattr(Loop, "_step", step)
    record = trained(tmp_path, tmp_path / "auto")
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "roomy"), rel=TOLERANCE)
    assert steps(tmp_path / "auto") == list(range(1, 7))
    (failure,) = read_history(tmp_path / "auto")
    assert failure.rung == "the spec as it is"
    assert failure.saved_step == 4
    assert "sim:0 is out of memory" in failure.why
    settings: Any = record.settings["memory_auto"]
    assert settings["rung"] == "batch.micro 4"
    assert settings["failures"] == [vars(failure)]
    assert any("the spec as it is was too much: sim:0 is out of memory" in note for note in record.notes)


@pytest.mark.usefixtures("simulated")
def test_with_nothing_less_to_try_the_run_fails_and_says_so(tmp_path: Path) -> None:
    MEMORY[0].limit_bytes = MEMORY[0].live_bytes + 2**19
    with pytest.raises(RunFailed, match="out of memory"):
        trained(tmp_path, tmp_path / "auto")


M_ARENA_MAX = -8  # malloc.h


def run_limited(folder: str, room_bytes: int, *overrides: str) -> None:
    """In a process of its own: leaves with 0 when it trained, 3 when memory did not suffice."""
    # The limit is of addresses: no thread is to reserve 64 MiB of them for an arena and 8 for its stack.
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    threading.stack_size(2**20)
    torch.ones(1, requires_grad=True).sum().backward()  # starts threads, whose stacks are addresses too
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + room_bytes,) * 2)
    try:
        train(Path(folder), Path(folder) / "out", *overrides)
    except RunFailed:
        sys.exit(3)


def limited(folder: Path, room_bytes: int, *overrides: str) -> int | None:
    folder.mkdir()
    process = start(run_limited, str(folder), room_bytes, *overrides)
    process.join(120)
    return process.exitcode


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits of a process")
def test_under_a_limit_of_the_system_it_fits_where_the_plain_run_dies(tmp_path: Path) -> None:
    wide = (
        "model.hidden=128",
        "model.layers=4",
        "model.positions=256",
        "data.seq_len=256",
        "batch={global: 64, micro: 64}",
        "train.steps=2",
    )
    room = 540 * 2**20  # the plain run needs 564 MiB for its tensors, half of its micro-batch 290
    assert limited(tmp_path / "plain", room, *wide, PLAIN) == 3
    assert limited(tmp_path / "auto", room, *wide) == 0
    assert limited(tmp_path / "roomy", 1 << 40, *wide, PLAIN) == 0
    found, expected = (losses(tmp_path / name / "out") for name in ("auto", "roomy"))
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
def test_after_a_kill_the_parent_begins_again_one_rung_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With 8 sequences a pass while it is built, with 4 at the third update; the first two are saved."""
    spec = tmp_path / "spec.yaml"
    text = SPEC.replace(
        "{preset: gpt2-nano, layers: 2, hidden: 64, heads: 2, positions: 64}",
        "{factory: tests.workers.hungry:build}",
    )
    spec.write_text(f"{text}checkpoint: {{every_steps: 1}}\n")
    out, vmstat = tmp_path / "out", tmp_path / "vmstat"
    vmstat.write_text("oom_kill 0\n")
    monkeypatch.setattr(cgroup, "PROC", tmp_path)
    monkeypatch.setenv(COUNTER, str(vmstat))
    assert run(Request(spec, "cpu", out)) == 0
    assert failed(out) == ["the spec as it is", "batch.micro 4"]
    assert all("SIGKILL (probably out of memory" in one.why for one in read_history(out))
    record = load_record(out)
    assert record.status == "done"
    assert steps(out) == list(range(1, 7))
    settings: Any = record.settings["memory_auto"]
    assert settings["rung"] == "batch.micro 2"
    assert "resumed from" in capfd.readouterr().err


def test_a_rung_s_spec_names_every_technique(tmp_path: Path) -> None:
    for rung in rungs(spec_of(tmp_path), 1, registry.load("cpu")):
        assert isinstance(rung, Rung)
        assert isinstance(rung.spec.memory, MemorySection)
