"""A process that has imported Composer, and forks each rank of a program instead of importing it anew.

Each line that it reads is JSON: the ``arguments`` of ``python``, and of each rank the ``folders`` to be in, the
``environments`` and the file for what is ``printed``. It answers with the exit statuses, on one line. A program
begins and ends as under ``python``, but for what is imported already and the seed of the hashes of strings.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time

import numpy as np
from composer.utils import checkpoint

import composer_prior.training.run  # noqa: F401


def run(arguments, folder, environment, printed):
    """Run ``python *arguments``."""
    with open(os.devnull) as nothing, open(printed, "w") as out:
        for file, descriptor in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # random does so by itself, and torch begins with the same seed in every process
    checkpoint._TORCH_DISTRIBUTED_CHECKPOINTS_FILENAME = f"__{environment['RANK']}_0.distcp"  # made by its import
    sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
    runpy.run_path(arguments[0], run_name="__main__")


def statuses_of(pids, timeout, patience):
    """Wait for all; end those that take too long, or that are left so many seconds after one has failed."""
    end, statuses = time.monotonic() + timeout, {}
    while len(statuses) < len(pids) and time.monotonic() < end:
        time.sleep(0.02)
        for pid in pids:
            if pid not in statuses and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                end = min(end, time.monotonic() + patience) if statuses[pid] else end
    for pid in pids:
        if pid not in statuses:
            os.killpg(pid, signal.SIGKILL)
            statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [statuses[pid] for pid in pids]


if __name__ == "__main__":
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        ranks = zip(request["folders"], request["environments"], request["printed"], strict=True)
        for folder, environment, printed in ranks:
            pids.append(os.fork())
            if pids[-1] == 0:
                run(request["arguments"], folder, environment, printed)
                sys.exit()
            os.setpgid(pids[-1], pids[-1])
        print(json.dumps(statuses_of(pids, request["timeout"], request["patience"])), flush=True)
