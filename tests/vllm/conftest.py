"""Processes for engines: several in one process share what a first one left behind."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.CompletedProcess]:
    """`start(*argv)`: run Python to its end, with its output."""

    def run(*argv: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, argv)],
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run
