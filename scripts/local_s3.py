"""Run a local S3 server to test buckets: ``python scripts/local_s3.py [bucket=captions] [port=0]``.

It listens on the loopback interface only, keeps all data in memory, prints the environment variables for streaming, and
ends with Ctrl-C or with the process that started it.
"""

import os
import signal
import sys
import time
from types import FrameType

from omegaconf import OmegaConf

HOST = "127.0.0.1"


def main(arguments: list[str]) -> None:
    """Serve until a signal arrives.

    Args:
        arguments: ``bucket=`` names a bucket to create, ``port=`` a port; 0 takes a free one.
    """
    try:
        import boto3
        from moto.server import ThreadedMotoServer
    except ImportError:
        sys.exit("error: the local S3 server needs moto: pip install 'moto[server]'.")
    options = OmegaConf.merge({"bucket": "captions", "port": 0}, OmegaConf.from_dotlist(arguments))
    parent = os.getppid()
    server = ThreadedMotoServer(ip_address=HOST, port=int(options.port), verbose=False)
    server.start()
    address = f"http://{HOST}:{server.get_host_and_port()[1]}"
    environment = {
        "S3_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": "local",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="local", aws_secret_access_key="local"
    )
    client.create_bucket(Bucket=options.bucket)

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # before it says that it is ready
    try:
        for name, value in environment.items():
            print(f"export {name}={value}")
        print(f"# s3://{options.bucket} is ready; Ctrl-C ends the server and deletes its data.", flush=True)
        while os.getppid() == parent:
            time.sleep(0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
