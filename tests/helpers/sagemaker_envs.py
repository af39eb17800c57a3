"""The environments that the SageMaker tests run in, each of its own: `make sagemaker-envs` builds them.

v2, v3: the SDKs (v3 with moto's server). platform: the training toolkit, the inference toolkit and the model server,
with this repo's requirements; all of it wants numpy < 2.
"""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

ENVS = Path(os.environ.get("SAGEMAKER_ENVS", ROOT / ".venv-sagemaker"))
SECRETS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


def program(env: str, name: str = "python") -> str:
    path = ENVS / env / "bin" / name
    if not path.exists():
        pytest.skip(f"{ENVS}/{env} is not built: make sagemaker-envs builds the environments of the SageMaker tests")
    return str(path)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, seconds: float) -> None:
    """Until `url` answers with status 200."""
    deadline = time.time() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert process.poll() is None, f"{process.args} ended"
            assert time.time() < deadline, f"{url} did not answer within {seconds} seconds"
            time.sleep(0.2)
