"""`xtrain launch`: what each host is told, and what is refused before anything starts."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.small_runs import SPEC, checkpoints, steps
from tests.started import ENDLESS, Started, nobody_is_left, starting  # noqa: F401
from xtrain.cli import main
from xtrain.launching.remote import Remote, verdict
from xtrain.request import this_program


def launch(folder: Path, *words: str, hosts: str | None = "gpu1 slots=2\ngpu2 slots=2\n") -> Result:
    (folder / "spec.yaml").write_text(SPEC.replace("global: 4", "global: 8"))
    command = ["launch", str(folder / "spec.yaml"), *words]
    if hosts is not None:
        (folder / "hosts").write_text(hosts)
        command += ["--hosts", str(folder / "hosts")]
    return CliRunner().invoke(main, command, catch_exceptions=False)


def printed(folder: Path, *words: str) -> dict[str, list[str]]:
    """By host, the words of its command."""
    result = launch(folder, "--print", "--out", "runs/a", *words)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    return {
        host.removeprefix("# on "): shlex.split(line)
        for host, line in zip(lines[::2], lines[1::2], strict=True)
    }


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_every_host_is_told_all_processes_where_to_meet_and_its_own_address(tmp_path: Path) -> None:
    commands = printed(tmp_path, "--set", "train.steps=5", "--max-restarts", "3")
    assert list(commands) == ["gpu1", "gpu2"]
    for host, words in commands.items():
        assert words[:4] == ["cd", str(Path.cwd()), "&&", "exec"]
        assert words[4 : 4 + len(this_program())] == this_program()
        assert option(words, "--nproc") == "4"
        assert option(words, "--nodes") == "2"
        assert option(words, "--meet") == "gpu1:29400"
        assert option(words, "--address") == host
        assert option(words, "--set") == "train.steps=5"
        assert option(words, "--max-restarts") == "3"
        assert option(words, "--out") == "runs/a"
    assert option(commands["gpu1"], "--id") == option(commands["gpu2"], "--id")


def test_torchrun_is_told_that_the_first_host_serves(tmp_path: Path) -> None:
    from torch.distributed.run import parse_args

    commands = printed(tmp_path, "--with", "torchrun", "--port", "29500")
    served = {host: option(words, "--rdzv-conf") for host, words in commands.items()}
    assert served == {"gpu1": "is_host=1", "gpu2": "is_host=0"}
    for words in commands.values():
        assert option(words, "--rdzv-endpoint") == "gpu1:29500"
        assert option(words, "--nproc-per-node") == "2"
        torchrun = parse_args(
            words[words.index("torch.distributed.run") + 1 :]
        )  # it could mistake ours for its own
        assert (torchrun.module, torchrun.training_script) == (True, "xtrain")
        assert option(torchrun.training_script_args, "--nproc") == "4"


def test_deepspeed_gets_one_command_and_is_told_to_add_no_option_of_its_own(tmp_path: Path) -> None:
    (words,) = printed(tmp_path, "--with", "deepspeed").values()
    assert option(words, "--hostfile") == str(tmp_path / "hosts")
    assert option(words, "--no_local_rank") == "--module"
    assert option(words, "--module") == "xtrain"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--print"], "a run on several hosts needs --out, a folder that all of them see"),
        (["--slurm", "--out", "a"], "expected one of --hosts and --slurm, found --hosts and --slurm"),
        (["--nodes", "2", "--out", "a"], "--nodes says nothing with --hosts; it belongs to --slurm"),
        (["--nproc", "3", "--out", "a"], "--nproc 3 contradicts "),
        (["--set", "batch.global=6", "--out", "a"], "--set batch.global=6"),
        (
            ["--with", "deepspeed", "--max-restarts", "2", "--out", "a"],
            "the deepspeed launcher restarts nothing",
        ),
        (["--with", "deepspeed", "--out", "a"], "give --print and start what is printed yourself"),
    ],
)
def test_what_cannot_be_launched_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    result = launch(tmp_path, *words)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "4", "--out", "a"], "--slurm needs --nodes, the number of hosts"),
        (["--nproc", "4", "--nodes", "3", "--out", "a"], "4 processes on 3 nodes: expected a multiple of 3"),
        (["--nproc", "4", "--nodes", "2"], "needs --out, a folder that all of them see"),
        (["--with", "torchrun"], "--with says nothing with --slurm; it belongs to --hosts"),
        (["--ssh", "ssh -p 2222"], "--ssh says nothing with --slurm; it belongs to --hosts"),
    ],
)
def test_a_script_that_could_not_run_is_not_written(tmp_path: Path, words: list[str], message: str) -> None:
    result = launch(tmp_path, "--slurm", *words, hosts=None)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_what_no_backend_can_run_is_refused_before_anything_is_printed(tmp_path: Path) -> None:
    words = ["--print", "--out", "a", "--set", "memory={offload: {optimizer: cpu}}"]
    result = launch(tmp_path, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "on backend deepspeed," in result.stderr
    assert "memory.offload.optimizer: found cpu, expected sharding" in result.stderr


@pytest.mark.parametrize("where", [["--print"], ["--slurm", "--nodes", "2", "--nproc", "4"]], ids=str)
def test_the_named_backend_is_asked_before_anything_is_printed(tmp_path: Path, where: list[str]) -> None:
    hosts = None if "--slurm" in where else "gpu1 slots=2\ngpu2 slots=2\n"
    result = launch(tmp_path, *where, "--out", "a", "--backend", "cpu", hosts=hosts)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "launch.processes: found 4, backend cpu is always one process" in result.stderr


def test_a_drive_that_only_the_hosts_have_is_left_to_them(tmp_path: Path) -> None:
    drive = "{sharding: parameters, offload: {optimizer: {device: nvme, path: /drive-of-the-hosts}}}"
    assert len(printed(tmp_path, "--backend", "deepspeed", "--set", f"memory={drive}")) == 2


@pytest.mark.parametrize(
    ("ssh", "message"),
    [
        ("'", 'error: --ssh: found "\'", which is no command: No closing quotation\n'),
        (" ", "error: --ssh: found nothing, expected a command such as `ssh -p 2222`; or leave it out\n"),
    ],
)
def test_an_ssh_that_is_no_command_is_refused(tmp_path: Path, ssh: str, message: str) -> None:
    result = launch(tmp_path, "--out", "a", "--ssh", ssh)
    assert (result.exit_code, result.stderr) == (2, message)


@pytest.mark.slow
def test_under_torchrun_too_a_run_saves_and_ends_when_its_launch_is_told_to(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    out = tmp_path / "out"
    where = ["--hosts", str(tmp_path / "hosts"), "--with", "torchrun", "--port", "29414", "--out", str(out)]
    words = ["launch", str(tmp_path / "spec.yaml"), "--backend", "cpu", *ENDLESS, *where]
    one = start([*this_program(), *words], out)
    one.wait_for("step 6/")
    one.send(signal.SIGTERM)
    assert one.ended() == 1, "torchrun calls it a failure"
    assert "SIGTERM: finishing the step and saving" in one.said()
    assert checkpoints(out)[-1] == steps(out)[-1]
    assert nobody_is_left(one)


@pytest.mark.parametrize(
    ("command", "how"),
    [("exit 7", "ended with exit code 7"), ("kill -9 $$", "was killed by signal 9")],
)
def test_a_host_whose_command_ends_is_told_with_its_exit_code(
    command: str, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    in_place_of_ssh = ["sh", "-c", 'eval "$1"']
    assert Remote({"gpu1": command, "gpu2": "true"}, in_place_of_ssh).wait() == 1
    assert capfd.readouterr().err == f"gpu1 {how}\n"


def test_hosts_that_cannot_be_reached_at_all_are_told_by_name(tmp_path: Path) -> None:
    result = launch(tmp_path, "--out", "a", "--ssh", "false")
    assert result.exit_code == 1
    assert sorted(result.stderr.splitlines()) == [f"gpu{n} ended with exit code 1" for n in (1, 2)]


@pytest.mark.parametrize("saved", [False, True])
def test_the_command_that_goes_on_starts_it_in_the_same_way(saved: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "resolved.json").write_text('{"began_after": 0}')
    if saved:
        (out / "checkpoints" / "step-00000004").mkdir(parents=True)
    way = ["--with", "torchrun", "--port", "29500", "--ssh", "false"]
    result = launch(tmp_path, "--out", str(out), "--allow-changed", *way)
    said, _, command = result.stderr.splitlines()[-1].partition(": ")
    words = shlex.split(command)
    assert said == "on all hosts, go on with"
    assert [words[words.index(name) : words.index(name) + 2] for name in way[::2]] == [
        way[place : place + 2] for place in range(0, len(way), 2)
    ]
    assert option(words, "--resume") == str(out)
    assert "--out" not in words
    assert ("--allow-changed" in words) == (not saved)


@pytest.mark.parametrize("launcher", ["xtrain", "torchrun"])
def test_what_is_started_on_a_host_ends_with_the_line_to_it(
    launcher: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, "--out", "a", "--with", launcher, "--ssh", "echo").exit_code == 0
    commands = capfd.readouterr().out.splitlines()
    assert [command.split()[-1] for command in commands] == ["--leash", "--leash"]


def test_a_bad_hostfile_is_refused_with_its_line(tmp_path: Path) -> None:
    result = launch(tmp_path, "--out", "a", hosts="gpu1 slots=2\ngpu2 2\n")
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {tmp_path}/hosts, line 2: found 'gpu2 2', expected a host and its number of processes, "
        "such as `gpu1 slots=8`\n"
    )


@pytest.mark.parametrize(
    "words", [["--nodes", "2"], ["--meet", "gpu1:29400"], ["--nodes", "2", "--meet", "gpu1", "--id", "a"]]
)
def test_an_incomplete_place_among_hosts_is_refused(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    result = CliRunner().invoke(main, ["run", str(tmp_path / "spec.yaml"), *words])
    assert result.exit_code == 2
    assert "belong together" in result.stderr or "expected HOST:PORT" in result.stderr


# --- SLURM: the script runs with stand-ins for its programs ----------------------------------------

STAND_IN = """\
#!/bin/sh
case "$(basename "$0")" in
srun) shift; SLURMD_NODENAME=gpu7 "$@"; exit ${ENDS_WITH:-0};;
scontrol) if [ "$1" = show ]; then printf 'gpu7\\ngpu8\\n'; else echo "scontrol $*"; fi;;
xtrain) echo "xtrain $*";;
esac
"""


def run_script(folder: Path, script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    for name in ("srun", "scontrol", "xtrain"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    program = shlex.join(this_program())
    (folder / "job.sh").write_text(script.replace(program, str(folder / "xtrain")))
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "gpu[7-8]"}
    return subprocess.run(
        ["bash", str(folder / "job.sh")],
        env={**variables, **environ},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_slurm_script_starts_one_task_per_node_and_is_queued_again_when_interrupted(tmp_path: Path) -> None:
    out = tmp_path / "a run"
    words = ["--slurm", "--nodes", "2", "--nproc", "4", "--out", str(out)]
    result = launch(tmp_path, *words, "--set", "train.steps=5", hosts=None)
    assert result.exit_code == 0
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in result.stdout
    first = run_script(tmp_path, result.stdout)
    assert first.returncode == 0, first.stderr
    spec = tmp_path / "spec.yaml"
    place = "--nodes 2 --meet gpu7:29400 --id 42-0 --address gpu7"
    began = f"xtrain run {spec} --backend auto --set train.steps=5 --nproc 4"
    assert first.stdout == f"{began} --out {out} {place}\n"

    out.mkdir()
    (out / "resolved.json").touch()
    again = run_script(tmp_path, result.stdout, SLURM_RESTART_COUNT="1", ENDS_WITH="75")
    assert again.returncode == 75
    place = place.replace("42-0", "42-1")
    assert again.stdout == f"{began} --resume {out} {place}\nscontrol requeue 42\n"


def test_slurm_script_resumes_one_run_into_the_directory_of_another(tmp_path: Path) -> None:
    """Queued again, it goes on with its own, once that is there."""
    old, out = tmp_path / "old run", tmp_path / "it's new"
    for folder in (old, out):
        folder.mkdir()
    words = ["--slurm", "--nodes", "2", "--nproc", "4", "--resume", str(old), "--out", str(out)]
    script = launch(tmp_path, *words, hosts=None).stdout
    for count in ("0", "1"):
        assert (
            f" --resume {old} --out {out} --nodes"
            in run_script(tmp_path, script, SLURM_RESTART_COUNT=count).stdout
        )
    (out / "resolved.json").touch()
    again = run_script(tmp_path, script, SLURM_RESTART_COUNT="1").stdout
    assert f" --nproc 4 --resume {out} --nodes" in again


def test_a_slurm_job_has_one_word_for_a_name(tmp_path: Path) -> None:
    (tmp_path / "my run; $x.v2.yaml").write_text(SPEC)
    words = ["--slurm", "--nodes", "2", "--nproc", "2", "--out", "a"]
    result = CliRunner().invoke(main, ["launch", str(tmp_path / "my run; $x.v2.yaml"), *words])
    assert result.exit_code == 0, result.stderr
    assert "#SBATCH --job-name=my-run---x.v2\n" in result.stdout


# --- one answer for all hosts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([0, 75], 75),
        ([255, 75], 75),  # the host where all meet was lost
        ([-9, 75], 75),
        ([1, 75], 1),
        ([2, 1], 2),
        ([255, 0], 1),
        ([143, 143], 143),
    ],
)
def test_exit_code_of_a_run_on_several_hosts(codes: list[int], code: int) -> None:
    assert verdict(codes) == code
