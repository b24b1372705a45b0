"""Start the ranks of a job on this node with Composer's launcher; after SIGTERM it waits until they have saved."""

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil
from composer.cli import launcher

from composer_prior.registry import Count, Whole


def launch(
    job: Sequence[str],
    *,
    nproc: Count | None = None,
    world_size: Count | None = None,
    node_rank: Whole | None = None,
    base_rank: Whole | None = None,
    master_addr: str | None = None,
    master_port: Count | None = None,
    stdout: str | None = None,
    stderr: str | None = None,
) -> int:
    """Start ranks and wait for them; what is not given is taken from the environment, as by Composer.

    Composer's own command sends SIGTERM on to its ranks and kills them 30 s later, while a large model's checkpoint
    takes minutes. Here they end by themselves when it is saved; where one has failed, the others still have 30 s.

    Args:
        job: its name and its words.
        nproc: ranks on this node; default: one for each GPU.
        world_size: ranks on all nodes.
        node_rank: number of this node.
        base_rank: number of its first rank, where nodes have unequal numbers of them.
        master_addr: address of the first node.
        master_port: a free port there.
        stdout: file for what other ranks than the node's first print, such as ``rank{rank}.txt``.
        stderr: likewise for their errors.

    Returns:
        the exit status.
    """
    given: dict[str, Any] = {key: value for key, value in locals().items() if key != "job" and value is not None}
    flags = [f"--{key}={value}" for key, value in given.items()]
    sys.argv = ["composer", *flags, "-m", "composer_prior", *job]
    signal.signal(signal.SIGTERM, _tell_ranks)
    return launcher.main()


def _tell_ranks(*_: object) -> None:
    for rank in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            rank.terminate()
