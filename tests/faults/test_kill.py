"""`oprd train` killed by SIGKILL, and the same command once more: nothing of it can be seen."""

import pytest

from killing import assert_same_run, finish, flags, kill_at, lasting, prompts
from oprd.cli import commands as cli
from oprd.folders.checkpoints import checkpoints, last_whole_checkpoint
from oprd.folders.claims import is_finished

pytestmark = pytest.mark.xdist_group("killed")

TRAIN = ["train", "recipes/tiny/vanilla.yaml"]
LIMIT = {"save_total_limit": 1}  # when the newest is being written there is no other one


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert cli.run([*TRAIN, *flags(folder, data, **LIMIT)]) == 0
    assert is_finished(folder, 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "call", "steps_done", "steps_kept"),
    [
        # in the fifth step's rollouts of 12 tokens
        pytest.param("rollout", 5 * 12 - 3, 4, 4, marks=pytest.mark.drill),
        # the sixth step's, in the second epoch
        pytest.param("update", 6, 5, 4, marks=pytest.mark.drill),
        ("save", 2, 4, 2),
    ],
)
def test_a_killed_run_goes_on(tmp_path, data, uninterrupted, moment, call, steps_done, steps_kept):
    folder = tmp_path / "run"
    argv = [*TRAIN, *flags(folder, data, **LIMIT)]
    kill_at(moment, call, argv)
    assert len(lasting(folder)) == steps_done
    assert last_whole_checkpoint(folder) == folder / f"checkpoint-{steps_kept}"
    assert not is_finished(folder, 1)
    said = finish(argv, folder)
    half_written = folder / "checkpoint-4"
    assert (f"{half_written} is passed over: it has no seal.json" in said) == (moment == "save")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6"]
    assert_same_run(folder, uninterrupted, last_step=6)
