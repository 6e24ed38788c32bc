"""A bucket server on this machine, and the environment in which all clients find it."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.checkpoint.test_remote import bucket_environment, fake_bucket_server


@contextmanager
def bucket_server() -> Iterator[str]:
    """With a bucket named ``bucket``."""
    with fake_bucket_server() as url:
        body = json.dumps({"name": "bucket"}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/storage/v1/b?project=p", body, headers)).close()
        yield url


def environment(url: str, tmp_path: Path) -> dict[str, str]:
    """For processes of a test."""
    variables = bucket_environment(url, tmp_path)
    # The device count of the tests would contradict that of the processes.
    return {name: value for name, value in variables.items() if name != "XLA_FLAGS"}
