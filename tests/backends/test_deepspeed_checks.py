"""What `xtrain check --backend deepspeed` says before anything starts; what only this machine lacks too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from backends import host_fp16 as fp16
from backends.deepspeed import environment
from backends.deepspeed.fp16 import fp16_problems
from backends.deepspeed.nvme import find_libaio, nvme_problems
from tests.small_specs import make_spec
from xtrain import registry
from xtrain.cli import main
from xtrain.contract import Job
from xtrain.errors import RequestError
from xtrain.spec.check import check_spec
from xtrain.spec.tree import Spec

BACKEND = registry.load("deepspeed")
INSTALLED = "xtrain.backends.deepspeed"
"""The package that BACKEND is of; `backends.deepspeed` is another copy of the same code."""


def on_drive(path: Path, key: str = "optimizer") -> Spec:
    offload = {key: {"device": "nvme", "path": str(path)}}
    return make_spec(memory={"sharding": "parameters", "offload": offload})


def test_more_processes_than_gpus_are_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in range(2):
        with pytest.raises(RequestError, match=r"found 2 processes on this host.*sees 1.*use --nproc 1"):
            environment.device_of(Job(rank, rank, 2, 2))


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    (problem,) = nvme_problems(on_drive(tmp_path / "none"), has_libaio=True)
    assert problem.path == "memory.offload.optimizer.path"
    assert "no such folder here" in str(problem)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs: a user for whom a folder can be read-only (not root)")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    (problem,) = nvme_problems(on_drive(tmp_path), has_libaio=True)
    assert "can be written to" in str(problem)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs: a folder that not even root can write to")
def test_a_folder_that_not_even_root_can_write_to_is_named() -> None:
    """os.access says that root may: only writing tells."""
    (problem,) = nvme_problems(on_drive(Path("/proc/self")), has_libaio=True)
    assert "expected a folder that can be written to: " in str(problem)


def test_asking_leaves_nothing_in_the_folder(tmp_path: Path) -> None:
    assert list(nvme_problems(on_drive(tmp_path), has_libaio=True)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (problem,) = nvme_problems(on_drive(tmp_path / "file"), has_libaio=True)
    assert "no such folder here" in str(problem)


@pytest.mark.parametrize("key", ["optimizer", "parameters"])
def test_a_missing_libaio_is_told_with_what_to_install(tmp_path: Path, key: str) -> None:
    (problem,) = nvme_problems(on_drive(tmp_path, key), has_libaio=False)
    assert problem.path == f"memory.offload.{key}.device"
    assert "libaio-dev" in problem.nearest


def test_libaio_is_found_where_the_compiler_is_told_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libaio.h").write_text("")
    monkeypatch.setenv("CFLAGS", f"-O2 -I{tmp_path}")
    assert find_libaio()


def test_parameters_leave_the_device_only_when_they_are_sharded() -> None:
    spec = make_spec(memory={"sharding": "gradients", "offload": {"parameters": "cpu"}})
    (problem,) = check_spec(spec)
    assert problem.path == "memory.offload.parameters"
    assert problem.nearest == "set memory.sharding: parameters"


@pytest.mark.parametrize(("world", "sound"), [(1, True), (2, True), (3, False), (4, True), (8, False)])
def test_processes_must_divide_the_batch(world: int, sound: bool) -> None:
    assert (BACKEND.problems(make_spec(), world) == []) is sound


def test_a_loss_scale_below_one_is_refused_for_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fp16.EMULATED, "1")
    spec = make_spec(precision={"dtype": "fp16", "min_loss_scale": 0.5})
    (problem,) = BACKEND.problems(spec, 1)
    assert problem.path == "precision.min_loss_scale"


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no GPU beside it, and nobody who asked for slow arithmetic."""
    monkeypatch.setattr(environment, "GPU_FILES", ())
    monkeypatch.delenv(fp16.EMULATED, raising=False)


@pytest.mark.usefixtures("on_a_cpu")
def test_fp16_on_a_processor_without_it_is_told_before_anything_starts() -> None:
    (problem,) = fp16_problems(make_spec(precision="fp16"), {"sse2", "avx512f"})
    assert problem.path == "precision"
    assert "no fp16 arithmetic" in problem.expected
    assert "bf16" in problem.nearest
    assert fp16.EMULATED in problem.nearest


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("precision", "flags"),
    [("bf16", {"sse2"}), ("fp16", {"sse2", "avx512_fp16"}), ("fp16", {"amx_fp16"}), ("fp16", set())],
    ids=["not asked for", "avx512", "amx", "nobody tells"],
)
def test_fp16_is_no_problem_where_it_may_be_there(precision: str, flags: set[str]) -> None:
    assert list(fp16_problems(make_spec(precision=precision), flags)) == []


def test_fp16_that_somebody_wants_slowly_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fp16.EMULATED, "1")
    assert list(fp16_problems(make_spec(precision="fp16"), {"sse2"})) == []


def test_fp16_beside_a_gpu_is_no_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "GPU_FILES", (str(tmp_path),))
    monkeypatch.delenv(fp16.EMULATED, raising=False)
    assert list(fp16_problems(make_spec(precision="fp16"), {"sse2"})) == []


@pytest.mark.parametrize("has_gpu", [False, True])
def test_activations_of_a_cpu_are_there_already_and_the_run_says_so(
    has_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{INSTALLED}.environment.GPU_FILES", (str(tmp_path),) if has_gpu else ())
    resolved = BACKEND.resolve(make_spec(memory={"offload": {"activations": "cpu"}}), 1)
    assert ("memory.offload.activations" in resolved.idle) is not has_gpu


def test_activations_do_not_go_to_a_drive(tmp_path: Path) -> None:
    target = {"device": "nvme", "path": str(tmp_path)}
    spec = make_spec(memory={"offload": {"activations": target}})
    assert "use cpu, or memory.checkpointing" in [problem.nearest for problem in BACKEND.problems(spec, 1)]


def test_check_asks_for_fp16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{INSTALLED}.environment.GPU_FILES", ())
    monkeypatch.setattr("xtrain.backends.host_fp16.cpu_flags", lambda: {"sse2"})
    monkeypatch.delenv(fp16.EMULATED, raising=False)
    assert [problem.path for problem in BACKEND.problems(make_spec(precision="fp16"), 1)] == ["precision"]


@pytest.mark.slow
def test_checking_imports_neither_torch_nor_deepspeed(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(
        "model: {preset: gpt2-nano}\ndata: {source: synthetic}\nbatch: {global: 8, micro: 2}\n"
        "train: {steps: 9}\noptimizer: {lr: 1e-3}\nmemory: {sharding: parameters}\n"
        "deepspeed: {zero_optimization: {stage: 2}}\n"
    )
    program = (
        "import sys\nfrom xtrain.cli import main\n"
        f"try:\n    main(['check', {str(path)!r}, '--backend', 'deepspeed', '--world', '2'])\n"
        "except SystemExit as ending:\n"
        "    print(ending.code, sorted({'torch', 'deepspeed'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 []\n", done.stderr


IMPOSSIBLE = """\
model: {preset: gpt2-nano}
data: {source: synthetic}
batch: {global: 8, micro: 2}
train: {steps: 9}
optimizer: {lr: 1e-3}
memory:
  sharding: gradients
  offload: {parameters: {device: nvme, path: /no/such/drive}}
deepspeed:
  gradient_cliping: 1.0
  zero_optimization: {stage: 3}
"""


def test_check_tells_all_that_is_impossible_at_once_and_starts_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    path = tmp_path / "spec.yaml"
    path.write_text(IMPOSSIBLE)
    done = CliRunner().invoke(main, ["check", str(path), "--backend", "deepspeed", "--world", "3"])
    assert done.exit_code == 2
    for place, told in {
        "3:17": "batch.global: found 8, expected a multiple of micro (2) x processes (3) = 6",
        "8:25": "memory.offload.parameters: found nvme, DeepSpeed swaps to a drive at stage 3 only; set",
        "8:46": "memory.offload.parameters.path: found /no/such/drive, no such folder here",
        "10:21": "deepspeed.gradient_cliping: found 1.0, unknown to DeepSpeed; did you mean 'gradient_cl",
        "11:30": "deepspeed.zero_optimization.stage: found 3, expected 2, from memory.sharding",
    }.items():
        assert f"  {place}: {told}" in done.stderr
