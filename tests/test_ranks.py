"""Ranks of processes that other launchers than Composer's have started."""

import os

import pytest
from common.recipes import TORCHRUN

from composer_prior.commands.cli import main
from composer_prior.commands.ranks import ranks_of_slurm, set_ranks

TASK = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04,7]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Give a test an environment of its own, without ranks."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in TORCHRUN}
    monkeypatch.setattr(os, "environ", kept)


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("job", ["train", "score", "evaluate", "study"])
def test_processes_that_do_not_know_of_each_other_are_refused(job, variable):
    os.environ[variable] = "2"
    with pytest.raises(SystemExit, match=f"{variable}=2 .*composer-prior launch"):
        main([job, "nosuch"])
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(SystemExit) as end:
        main([job, "nosuch"])
    assert variable not in str(end.value.code)


def test_tasks_of_srun_get_ranks():
    os.environ |= TASK
    set_ranks()
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")}
    assert [*found.values()] == ["5", "9", "1", "4", "1"]
    assert os.environ["MASTER_ADDR"] == "gpu03"
    assert os.environ["MASTER_PORT"] == "23658"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node7", "node7"), ("a1,b[2-3]", "a1"), ("n[09-10]-ib,m1", "n09-ib"), ("r[1,3]c[5-6]", "r1c5"), ("x[5]", "x5")],
)
def test_the_first_host_of_a_list(hosts, first):
    os.environ |= TASK | {"SLURM_STEP_NODELIST": hosts}
    assert ranks_of_slurm()["MASTER_ADDR"] == first


@pytest.mark.parametrize(("node", "tasks"), [(0, "4"), (1, "4"), (2, "1")])
def test_nodes_of_unequal_numbers_of_tasks(node, tasks):
    os.environ |= TASK | {"SLURM_NODEID": str(node)}
    assert ranks_of_slurm()["LOCAL_WORLD_SIZE"] == tasks


@pytest.mark.parametrize(
    "given", [{"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": None}]
)
def test_what_needs_no_ranks_is_left_alone(given):
    """Such as the shell of salloc, a step of one process, and the script of sbatch, which is in no step."""
    os.environ |= {name: value for name, value in (TASK | given).items() if value is not None}
    before = dict(os.environ)
    set_ranks()
    assert os.environ == before


def test_variables_that_are_set_stay():
    os.environ |= TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7501"}
    set_ranks()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "7501")
