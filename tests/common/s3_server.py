"""The S3 server of ``scripts/local_s3.py`` for the time of some tests."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/local_s3.py"


@contextmanager
def s3_server(bucket: str) -> Iterator[dict[str, str]]:
    """Run a server with an empty bucket; the environment that leads to it."""
    command = [sys.executable, str(SCRIPT), f"bucket={bucket}"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert running.stdout is not None
    try:
        environment = {}
        while (line := running.stdout.readline()).startswith("export "):
            name, value = line.removeprefix("export ").strip().split("=", 1)
            environment[name] = value
        assert line.startswith("# s3://"), line
        yield environment
        running.terminate()
        assert running.wait(60) == 0
    finally:  # of a test that failed, too: it would wait for the server, and the server for it
        running.kill()
        running.wait()
        running.stdout.close()
