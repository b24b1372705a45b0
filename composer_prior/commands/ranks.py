"""The ranks of a job that a launcher without torchrun's variables has started."""

import os
import re
import sys

# Number of processes, of launchers that do not set RANK and WORLD_SIZE: Slurm, Open MPI, MPICH.
# SLURM_NTASKS is that of the job, also in its script and in the shell of salloc, which are one process.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_PORTS = range(20000, 30000)  # of node 0: below those that Linux gives to clients


def set_ranks() -> None:
    """Set torchrun's variables from those of ``srun``, or end with one line where a launcher tells no ranks.

    Variables that are set already stay.
    """
    for name in _TASKS if not {"RANK", "WORLD_SIZE"} & {*os.environ} else ():
        if os.environ.get(name, "1") not in ("", "0", "1"):
            if name != "SLURM_STEP_NUM_TASKS" or "SLURM_PROCID" not in os.environ:
                sys.exit(
                    f"error: {name}={os.environ[name]} processes were started without ranks (RANK, WORLD_SIZE): "
                    "start the ranks of each node with composer-prior launch, or one process alone."
                )
            for variable, value in ranks_of_slurm().items():
                os.environ.setdefault(variable, value)
            return


def ranks_of_slurm() -> dict[str, str]:
    """Return torchrun's variables for this task of ``srun``.

    The address is the first host of the step, and the port follows from the numbers of job and step, so that all tasks
    find the same without talking to each other.
    """
    given = os.environ
    node = int(given["SLURM_NODEID"])
    counts = []  # tasks of each node, written as 8(x3),4
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", given["SLURM_STEP_TASKS_PER_NODE"]):
        counts += [count] * int(times or 1)
    hosts = given.get("SLURM_STEP_NODELIST") or given["SLURM_JOB_NODELIST"]
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.split(r",(?![^\[]*\])", hosts)[0])  # gpu[03-05,9]-ib is gpu03-ib
    number = int(given["SLURM_JOB_ID"]) + 101 * int(given["SLURM_STEP_ID"])
    return {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": counts[node],
        "NODE_RANK": str(node),
        "MASTER_ADDR": first,
        "MASTER_PORT": str(_PORTS[number % len(_PORTS)]),
    }
