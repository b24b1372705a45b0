"""The S3 server of ``scripts/local_s3.py``: one for all tests of this process, with a bucket for the time of some."""

import atexit
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

SCRIPT = Path(__file__).parents[2] / "scripts/local_s3.py"


def started(*words: str) -> tuple["subprocess.Popen[str]", dict[str, str]]:
    """Start a server, and return it with the environment that leads to it."""
    running = subprocess.Popen(
        [sys.executable, str(SCRIPT), *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    environment = {}
    try:
        assert running.stdout is not None
        while (line := running.stdout.readline()).startswith("export "):
            name, value = line.removeprefix("export ").strip().split("=", 1)
            environment[name] = value
        assert line.startswith("# s3://"), line
    except BaseException:
        running.kill()
        raise
    return running, environment


@cache
def _shared() -> dict[str, str]:
    """Start the server of all tests; it ends with this process."""
    running, environment = started("bucket=unused")
    atexit.register(running.kill)
    return environment


@contextmanager
def s3_server(bucket: str) -> Iterator[dict[str, str]]:
    """Make an empty bucket, and remove it at the end; the environment that leads to it."""
    environment = _shared()
    store = boto3.resource(
        "s3",
        endpoint_url=environment["S3_ENDPOINT_URL"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )
    made = store.create_bucket(Bucket=bucket)
    assert not [*made.objects.all()], f"{bucket} is in use, or an earlier test could not remove it"
    try:
        yield dict(environment)
    finally:
        with suppress(BotoCoreError, ClientError):  # the error of a test would be hidden
            made.objects.delete()
            made.delete()
