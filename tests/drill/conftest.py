"""The drill: real processes, killed and starved. `make drill`; DRILL_SEED repeats its random moments."""

import os
import random

import pytest

from killing import CLI, prompts, run

SEED = os.environ.setdefault("DRILL_SEED", str(random.randrange(10**6)))  # for the workers too


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"DRILL_SEED={SEED}")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(scope="session")
def bridge_flags(data):
    """`bridge_flags(folder)`: the command that fits a small bridge there."""
    small = {"dataset_name": data, "num_generations": 8, "max_completion_length": 16, "rank": 8}

    def command(folder):
        words = [word for key, value in small.items() for word in (f"--{key}", str(value))]
        return ["bridge", "recipes/tiny/bridge.yaml", "--output_dir", str(folder), *words]

    return command


@pytest.fixture(scope="session")
def bridge(tmp_path_factory, bridge_flags):
    folder = tmp_path_factory.mktemp("bridge") / "fitted"
    code, said = run(CLI, bridge_flags(folder))
    assert code == 0, said[-3000:]
    return folder
