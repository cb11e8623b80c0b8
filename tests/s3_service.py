"""An S3 service on this machine (moto's server, over HTTP), and the environment that a user needs to reach it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_service(bucket: str) -> Iterator[str]:
    """Run the service with one empty bucket and yield its endpoint; the environment is set while the block runs."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # otherwise one line per request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
                patch.delenv(name)
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            ask(f"{endpoint}/moto-api/reset")  # moto's state is global: an earlier service may have left some
            boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=bucket)
            reconnect()
            yield endpoint
    finally:
        server.stop()
        reconnect()


def ask(url: str, body: str = "") -> None:
    """POST to moto's own API."""
    with urlopen(Request(url, body.encode(), {"Content-Type": "text/plain"})):
        pass


def reconnect() -> None:
    """Make the next access to s3:// use the current environment."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def upload(root: Path, url: str) -> None:
    """Upload the files below `root` to `url`, as in docs/sharing.md."""
    fsspec.filesystem("s3").put(f"{root}/", f"{url}/", recursive=True)
