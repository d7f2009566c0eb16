"""Runs to attack, and real processes to kill (`make drill`; DRILL_SEED repeats its random moments)."""

import os
import random

import pytest

import killing
from trainer_fixtures import *  # noqa: F403

SEED = os.environ.setdefault("DRILL_SEED", str(random.randrange(10**6)))  # for the workers too


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == "drill":
        terminalreporter.write_line(f"DRILL_SEED={SEED}")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return killing.prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


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
    code, said = killing.run(killing.CLI, bridge_flags(folder))
    assert code == 0, said[-3000:]
    return folder
