"""A Ray cluster for the time of some tests."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAM = Path(__file__).parent / "programs/ray_cluster.py"


@contextmanager
def ray_cluster(folders: Sequence[Path], **environment: str) -> Iterator[dict[str, str]]:
    """Run a cluster on loopback with a node of one CPU in each folder; the environment of its drivers."""
    with tempfile.TemporaryDirectory(prefix="ray") as sockets:  # their paths must be short
        environment |= {"RAY_TMPDIR": sockets, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        environment |= {"RAY_worker_niceness": "0", "RAY_enable_metrics_collection": "0"}  # as quick as can be
        running = subprocess.Popen(
            [sys.executable, str(PROGRAM), *map(str, folders)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert running.stdout is not None
        try:
            address = running.stdout.readline().strip()
            assert address, "the cluster has not started"
            yield {**environment, "RAY_ADDRESS": address}
        finally:
            running.communicate(timeout=60)
    assert running.returncode == 0
