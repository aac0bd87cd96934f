"""`xtrain check`, `schema` and `backends` as programs and people meet them: streams and exit codes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.small_specs import make_spec
from xtrain import __version__, registry
from xtrain.cli import main
from xtrain.contract import Foretells, Problem
from xtrain.spec import locate

GOOD = """\
model: {preset: gpt2-nano}
data: {source: stdlib}
batch: {global: 16, micro: 8}
train: {steps: 200}
optimizer: {lr: 1e-3}
"""


def xtrain(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return path


def test_good_spec_is_said_to_be_ok_on_standard_output(good: Path) -> None:
    result = xtrain("check", good)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        f"{good}: ok: gpt2-nano on stdlib; 200 updates of 16 sequences x 128 tokens; "
        "8 at a time on 1 process; adamw, lr 0.001, cosine; fp32\n"
    )


def test_summary_of_a_good_spec_says_what_was_asked_for(good: Path) -> None:
    words = ["--world", 2, "--set", "precision=bf16", "--set", "optimizer={name: sgd, lr: 0.5}"]
    result = xtrain("check", good, "--backend", "deepspeed", *words, "--set", "schedule=constant")
    assert result.stdout == (
        f"{good}: ok on deepspeed: gpt2-nano on stdlib; 200 updates of 16 sequences x 128 tokens; "
        "8 at a time on 2 processes; sgd, lr 0.5, constant; bf16 with fp32 weights\n"
    )


def test_bad_spec_is_an_error_on_standard_error_and_exit_code_2(empty: Path) -> None:
    result = xtrain("check", empty)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {empty} has 1 problem\n")


def test_every_spec_is_reported_and_one_bad_one_is_enough_for_exit_code_2(good: Path, empty: Path) -> None:
    result = xtrain("check", empty, good)
    assert result.exit_code == 2
    assert f"{good}: ok" in result.stdout
    assert f"error: {empty} has" in result.stderr


def test_json_stands_alone_on_standard_output(good: Path, empty: Path) -> None:
    result = xtrain("check", "--json", good, empty)
    assert (result.exit_code, result.stderr) == (2, "")
    first, second = json.loads(result.stdout)
    assert first == {"spec": str(good), "problems": [], "warnings": [], "notes": []}
    assert second["spec"] == str(empty)
    assert len(second["problems"]) == 1


def test_override_is_part_of_what_is_checked(good: Path) -> None:
    assert xtrain("check", good, "--set", "train.steps=0").exit_code == 2
    assert xtrain("check", good, "--set", "train.steps=1").exit_code == 0


def test_named_backend_is_asked_with_the_given_number_of_processes(good: Path) -> None:
    assert xtrain("check", good, "--backend", "null", "--world", 1).exit_code == 0
    result = xtrain("check", good, "--backend", "null", "--world", 2)
    assert result.exit_code == 2
    assert "launch.processes: found 2, backend null is always one process; use --nproc 1" in result.stderr


def test_what_a_backend_cannot_honour_is_told_with_its_place_beside_all_else(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_drive = "memory: {offload: {optimizer: {device: nvme, path: drive}}}"
    good.write_text(f"{GOOD}{on_a_drive}\nprecision: fp8\nlaunch:\n  processes: 2\n")
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = xtrain("check", good, "--backend", "cpu", "--set", "train.compile=true")
    assert result.stderr == (
        f"error: {good}, on backend cpu, has 4 problems\n"
        "  6:31: memory.offload.optimizer: found nvme, this backend offloads to the CPU only; use cpu, or "
        "--backend deepspeed\n"
        "  7:12: precision: found 'fp8', expected fp32, bf16, fp16 or a section with dtype, weights, "
        "loss_scale, initial_scale_power, ...\n"
        "  9:14: launch.processes: found 2, backend cpu is always one process; use --nproc 1, or --backend "
        "deepspeed for 2 processes\n"
        "  --set train.compile=true: train.compile: found true, torch.compile builds machine code and finds "
        "no compiler (no-such-compiler; the variable CXX names another); install them, or use false\n"
    )


def test_devices_that_are_not_on_this_machine_are_a_warning_as_the_spec_may_be_for_another(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drivers = importlib.import_module("xtrain.backends.manual.drivers")
    good.write_text(f"{GOOD}manual:\n  devices: [main, cuda:1, cpu, mps]\n")
    monkeypatch.setattr(drivers, "DRIVERS", ())
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    result = xtrain("check", good, "--backend", "cpu")
    assert (result.exit_code, result.stdout.partition(":")[2][:12]) == (0, " ok on cpu: ")
    fine = "fine where the spec is for another one; here use main or cpu"
    begin = "warning: 7:12: manual.devices: found"
    assert result.stderr == (
        f"{begin} cuda:1, not on this machine: no driver of a GPU found; {fine}\n"
        f"{begin} mps, not on this machine: it is no Mac with Apple silicon; {fine}\n"
    )
    (found,) = json.loads(xtrain("check", "--json", good, "--backend", "cpu").stdout)
    assert [warning["found"] for warning in found["warnings"]] == ["cuda:1", "mps"]
    monkeypatch.setattr(drivers, "DRIVERS", ("/",))
    assert "cuda:1" not in xtrain("check", good, "--backend", "cpu").stderr


ONCE = {
    "nvme": (
        "memory: {offload: {optimizer: nvme}}",
        "memory.offload.optimizer",
        "backend offloads to the CPU",
    ),
    "parameters": (
        "memory: {offload: {parameters: cpu}}",
        "memory.offload.parameters",
        "where its weights are",
    ),
    "both": ("memory: {offload: {parameters: nvme}}", "memory.offload.parameters", "where its weights are"),
}


@pytest.mark.parametrize("case", ONCE)
def test_what_a_backend_refuses_is_not_asked_for_more_of(good: Path, case: str) -> None:
    """Else a path would be wanted for a drive that is refused anyway."""
    text, path, reason = ONCE[case]
    good.write_text(f"{GOOD}{text}\n")
    (checked,) = json.loads(xtrain("check", "--json", good, "--backend", "cpu").stdout)
    (problem,) = checked["problems"]
    assert problem["path"] == path
    assert reason in problem["expected"]
    alone = json.loads(xtrain("check", "--json", good).stdout)[0]["problems"]
    assert alone  # without a backend, what the spec itself lacks is told


def test_number_of_processes_that_is_not_the_files_has_no_place_in_it(good: Path) -> None:
    good.write_text(f"{GOOD}launch: {{processes: 1}}\n")
    (checked,) = json.loads(xtrain("check", "--json", good, "--backend", "null", "--world", 2).stdout)
    (problem,) = checked["problems"]
    assert (problem["path"], problem["found"], problem["line"]) == ("launch.processes", "2", None)


def test_backends_problems_elsewhere_are_located_in_the_file(good: Path) -> None:
    good.write_text(f"{GOOD}memory: auto\n")
    given = [Problem("memory", "auto", "no"), Problem("train.seed", "1", "no"), Problem("zzz", "", "no")]
    assert [str(problem) for problem in locate(given, good, ["train.seed=1"])] == [
        "6:9: memory: found auto, no",
        "--set train.seed=1: train.seed: found 1, no",
        "zzz: no",
    ]


def test_unknown_backend_is_refused_with_those_there_are(good: Path) -> None:
    result = xtrain("check", good, "--backend", "gpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: no backend named 'gpu'. Installed: {', '.join(registry.names())}\n"


def test_backends_are_all_listed_for_people_and_for_programs() -> None:
    listed = json.loads(xtrain("backends", "--json").stdout)
    assert sorted(listed) == registry.names()
    assert listed["null"] == {"usable": True, "reason": "scripted losses; trains nothing"}
    table = xtrain("backends").stdout
    assert all(name in table for name in registry.names())


def test_schema_is_one_json_object_that_editors_recognise() -> None:
    schema = json.loads(xtrain("schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/draft/")
    assert schema["additionalProperties"] is False
    assert {"model", "data", "batch", "train", "optimizer"} <= set(schema["required"])


def test_version_is_the_package_version() -> None:
    assert xtrain("--version").stdout == f"xtrain, version {__version__}\n"


def test_interrupted_command_exits_as_shells_expect(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xtrain.check.check_file", interrupted)
    result = xtrain("check", good)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


HEAVY = {"torch", "deepspeed", "numpy", "transformers"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], HEAVY | {"pydantic"}),
        (["check", "{spec}"], HEAVY),
        (["check", "{spec}", "--backend", "deepspeed"], HEAVY),
        (["check", "{spec}", "--set", "model={hf: configs/llama-tiny}", "--backend", "cpu"], HEAVY),
    ],
)
def test_command_that_trains_nothing_imports_neither_torch_nor_deepspeed(
    words: list[str], heavy: set[str], good: Path
) -> None:
    program = (
        "import sys\nfrom xtrain.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        f"print('imported', sorted({heavy} & set(sys.modules)), code)"
    )
    words = [word.replace("{spec}", str(good)) for word in words]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported [] 0", done.stderr


def test_what_a_run_would_say_at_its_start_is_said_by_check(good: Path) -> None:
    good.write_text(f"{GOOD}manual: {{devices: [main]}}\nmemory: {{sharding: optimizer}}\n")
    result = xtrain("check", good, "--backend", "deepspeed")
    notes = [
        "memory.sharding saves nothing here: one process has nothing to shard it over",
        "the manual section is for another backend and is not used",
    ]
    assert (result.exit_code, result.stderr) == (0, "".join(f"note: {note}\n" for note in notes))
    (checked,) = json.loads(xtrain("check", "--json", good, "--backend", "deepspeed").stdout)
    assert checked["notes"] == notes
    assert xtrain("check", good).stderr == ""  # nobody was asked


@pytest.mark.parametrize("backend", ["cpu", "deepspeed"])
def test_the_notes_of_check_are_those_of_the_run(backend: str) -> None:
    spec = make_spec(memory={"sharding": "optimizer"}, model={"factory": "a.b:c", "blocks": "layers"})
    asked = registry.load(backend)
    assert isinstance(asked, Foretells)
    assert asked.notes(spec, 1) == list(asked.resolve(spec, 1).notes) != []


def test_fp16_on_a_processor_without_it_is_a_warning_for_a_manual_backend(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xtrain.backends.host_fp16.cpu_flags", lambda: {"sse2"})
    monkeypatch.delenv("XTRAIN_EMULATED_FP16", raising=False)
    words = ["check", good, "--set", "precision=fp16"]
    said = xtrain(*words, "--backend", "cpu")
    assert said.exit_code == 0
    assert said.stderr == (
        "warning: --set precision=fp16: precision: found fp16, not on this machine: this processor has no "
        "fp16 arithmetic (on a CPU avx512_fp16 or AMX); fine where the spec is for another one; here use "
        "precision: bf16, or set XTRAIN_EMULATED_FP16=1 to have it computed slowly\n"
    )
    assert "precision" not in xtrain(*words, "--backend", "cuda").stderr
    shared = ["--set", "manual={devices: [main, cpu]}"]
    assert "precision: found fp16, not on this machine" in xtrain(*words, "--backend", "cuda", *shared).stderr
    monkeypatch.setattr("xtrain.backends.host_fp16.cpu_flags", lambda: {"amx_fp16"})
    assert xtrain(*words, "--backend", "cpu").stderr == ""
