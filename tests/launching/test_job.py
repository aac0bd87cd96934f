"""Which job a process belongs to, from nothing but its environment."""

from __future__ import annotations

import pytest

from xtrain.contract import Job
from xtrain.errors import RequestError
from xtrain.launching.job import SLURM_PORTS, first_host, join

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
SBATCH_SCRIPT = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "node[07-09]",
}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_a_process_of_its_own_joins_nothing_and_its_environment_is_left_alone() -> None:
    environ = {"HOME": "/home/ada", "LOCAL_RANK": "0"}
    assert join(environ) is None
    assert environ == {"HOME": "/home/ada", "LOCAL_RANK": "0"}


def test_joins_what_torchrun_started() -> None:
    assert join(dict(TORCHRUN)) == Job(rank=5, local_rank=1, world=8, local_world=4)


def test_joins_what_the_deepspeed_launcher_started() -> None:
    environ = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_SIZE": "2"}
    assert join(environ) == Job(rank=5, local_rank=1, world=8, local_world=4)


def test_without_a_local_world_the_job_is_on_one_host() -> None:
    assert join(without(TORCHRUN, "LOCAL_WORLD_SIZE")) == Job(rank=5, local_rank=1, world=8, local_world=8)


def test_a_job_of_one_process_is_a_job() -> None:
    assert join({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) == Job()


def test_torchrun_within_an_srun_step_decides() -> None:
    assert join({**SRUN, **TORCHRUN}) == Job(rank=5, local_rank=1, world=8, local_world=4)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(RequestError, match=rf"^{name} must be a whole number .* it is not set"):
        join(without(TORCHRUN, name))


@pytest.mark.parametrize("value", ["", "two", "-1", "1.0", "²"])
def test_what_is_no_whole_number_is_quoted(value: str) -> None:
    with pytest.raises(RequestError, match=rf"^LOCAL_RANK must be a whole number .* found '{value}'"):
        join({**TORCHRUN, "LOCAL_RANK": value})


@pytest.mark.parametrize(
    "wrong",
    [{"RANK": "8"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "9"}, {"WORLD_SIZE": "0"}],
    ids=str,
)
def test_variables_that_contradict_each_other_are_named_with_their_values(wrong: dict[str, str]) -> None:
    environ = {**TORCHRUN, **wrong}
    with pytest.raises(RequestError) as refused:
        join(environ)
    for name, value in environ.items():
        assert f"{name}={value}" in str(refused.value)
    assert "unset them, or start through" in str(refused.value)


def test_joins_an_srun_step_and_tells_torch_where_to_meet() -> None:
    environ = dict(SRUN)
    assert join(environ) == Job(rank=9, local_rank=1, world=11, local_world=3)
    added = without(environ, *SRUN)
    assert int(added.pop("MASTER_PORT")) in SLURM_PORTS
    assert added == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "11",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "node07",
    }


def test_joining_twice_gives_the_same_place() -> None:
    environ = dict(SRUN)
    assert join(environ) == join(environ)


def port(**wrong: str) -> str:
    environ = {**SRUN, **wrong}
    join(environ)
    return environ["MASTER_PORT"]


def test_all_tasks_of_a_step_have_one_port_and_other_jobs_and_steps_another() -> None:
    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert len({port(), port(SLURM_JOB_ID="4712"), port(SLURM_STEP_ID="1")}) == 3


def test_a_meeting_place_that_is_given_stays() -> None:
    environ = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
    join(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "29400")


@pytest.mark.parametrize(
    "environ",
    [
        SBATCH_SCRIPT,
        without(SBATCH_SCRIPT, "SLURM_PROCID", "SLURM_LOCALID"),  # an salloc shell
        {**SBATCH_SCRIPT, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # srun -n 1
    ],
    ids=["sbatch", "salloc", "interactive", "one task"],
)
def test_an_allocation_without_several_tasks_is_no_job(environ: dict[str, str]) -> None:
    environ = dict(environ)
    before = dict(environ)
    assert join(environ) is None
    assert environ == before


def test_slurm_variables_that_contradict_each_other_are_named_as_slurm_names_them() -> None:
    with pytest.raises(RequestError, match=r"SLURM_PROCID=11, .*SLURM_STEP_NUM_TASKS=11"):
        join({**SRUN, "SLURM_PROCID": "11"})
    with pytest.raises(RequestError, match=r"^SLURM_NODEID=3 contradicts .*=4\(x2\),3, which has 3 nodes"):
        join({**SRUN, "SLURM_NODEID": "3"})
    with pytest.raises(RequestError, match=r"^SLURM_STEP_TASKS_PER_NODE='many' cannot be read"):
        join({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"})
    with pytest.raises(RequestError, match=r"^SLURM_LOCALID must be a whole number .* it is not set"):
        join(without(SRUN, "SLURM_LOCALID"))


@pytest.mark.parametrize("name", ["SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"])
def test_a_refused_step_leaves_the_environment_alone(name: str) -> None:
    environ = {**SRUN, name: "]"}
    before = dict(environ)
    with pytest.raises(RequestError):
        join(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu3", "gpu3"),
        ("gpu3,gpu4", "gpu3"),
        ("node[01-04,7],gpu3", "node01"),
        ("node[7,09-12]", "node7"),
        ("node[007]", "node007"),
        ("rack[1-2]node[01-16]", "rack1node01"),
        ("rack[1,3]-gpu[2-4].cluster.org,login1", "rack1-gpu2.cluster.org"),
        ("10.0.0.7,10.0.0.8", "10.0.0.7"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "node[01-04", "node[]", "]", ",gpu3"])
def test_a_list_that_cannot_be_read_says_what_to_set(nodes: str) -> None:
    with pytest.raises(RequestError, match=r"cannot be read.* set MASTER_ADDR to the first host"):
        first_host(nodes)
