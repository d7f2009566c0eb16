"""Two processes, one of which is killed: the other ends, and the same command goes on."""

import pytest

from killing import CLI, DRIVER, TORCHRUN, assert_same_run, finish, flags, lasting, run
from oprd.folders.checkpoints import last_whole_checkpoint
from oprd.folders.lock import hold

pytestmark = pytest.mark.drill

COMMAND = [*TORCHRUN, "--module", *CLI[2:]]
TRAIN = ["train", "recipes/tiny/vanilla.yaml"]
RANKS = {"gradient_accumulation_steps": 1, "use_cpu": True, "ddp_backend": "gloo", "save_total_limit": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run") / "whole"
    finish([*TRAIN, *flags(folder, data, **RANKS)], folder, COMMAND)
    return folder


@pytest.mark.parametrize(
    ("moment", "call", "kept"),
    [("rollout", 5 * 12 - 3, 4), ("update", 3, 2), ("rng", 2, 2), ("rng", 1, None)],
)
def test_a_killed_rank_ends_the_job_and_leaves_no_trace(tmp_path, data, uninterrupted, moment, call, kept):
    """Rank 1's random state may be half-written when everything of rank 0 is there."""
    folder = tmp_path / "run"
    argv = [*TRAIN, *flags(folder, data, **RANKS)]
    code, said = run([*TORCHRUN, *DRIVER[1:], moment, str(call)], argv)
    assert code == 1 and "exitcode  : -9" in said, said[-3000:]
    assert last_whole_checkpoint(folder) == (kept and folder / f"checkpoint-{kept}")
    finish(argv, folder, COMMAND)
    assert (folder / "checkpoint-6" / "rng_state_1.pth").exists()
    assert_same_run(folder, uninterrupted, last_step=6)
    assert len(lasting(folder)) == 6


def test_all_ranks_are_refused_in_a_folder_in_use(tmp_path, data):
    """At once, although only the first one looks; and one of them tells it."""
    folder = tmp_path / "run"
    with hold(folder, "oprd train"):
        code, said = run(COMMAND, [*TRAIN, *flags(folder, data, **RANKS)])
    assert code == 1 and said.count(f"oprd: {folder} is in use by oprd train (process ") == 1
    assert said.count("exitcode  : 2") == 1 and not folder.exists()
