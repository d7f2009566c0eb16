"""One kill at each moment at which files are half there, and the same command once more."""

import pytest
from safetensors.torch import load_file

from killing import CLI, assert_same_run, finish, flags, kill_at, run

pytestmark = pytest.mark.drill

TRAIN = ["train", "recipes/tiny/vanilla.yaml"]
ACCURACY = {
    "save_total_limit": 1,
    "accuracy_dataset_name": "tiny",
    "accuracy_steps": 2,
    "accuracy_problems": 4,
    "accuracy_samples": 2,
}


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run") / "whole"
    finish([*TRAIN, *flags(folder, data, **ACCURACY)], folder)
    return folder


@pytest.mark.parametrize(
    "kills",
    [
        [("resolved", 1)],
        [("evaluation", 5)],  # before the line and the checkpoint of its step
        [("evaluation", 13)],
        [("metrics", 5)],  # the first is the empty file
        [("weights", 1)],
        [("weights", 2)],
        [("rng", 2)],
        [("state", 2)],
        [("seal", 1)],
        [("seal", 2)],
        [("rotation", 1)],
        [("update", 3), ("resolved", 1), ("metrics cut back", 1), ("save", 1), ("rotation", 1)],
        [("final weights", 1)],
        [("final state", 1), ("final weights", 1)],
        [("final move", 5)],
        [("final seal", 5), ("resolved", 1)],  # three checkpoints', the one aside, the one at the root
    ],
    ids=str,
)
def test_a_kill_at_any_moment_leaves_no_trace(tmp_path, data, uninterrupted, kills):
    folder = tmp_path / "run"
    argv = [*TRAIN, *flags(folder, data, **ACCURACY)]
    for moment, call in kills:
        kill_at(moment, call, argv)
    finish(argv, folder)
    assert_same_run(folder, uninterrupted, last_step=6)
    names = [{path.name for path in run.iterdir()} for run in (folder, uninterrupted)]
    aside = {"earlier-1"}  # what a run left that was killed before its first checkpoint
    assert names[1] <= names[0] <= names[1] | aside


def test_a_bridge_killed_while_it_is_saved_is_fitted_again(tmp_path, bridge, bridge_flags):
    folder = tmp_path / "bridge"
    kill_at("bridge", 1, bridge_flags(folder))
    assert not (folder / "bridge.safetensors").exists()
    code, said = run(CLI, bridge_flags(folder))
    assert code == 0, said[-3000:]
    assert {path.name for path in folder.iterdir()} == {path.name for path in bridge.iterdir()}
    one, other = load_file(folder / "bridge.safetensors"), load_file(bridge / "bridge.safetensors")
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize("moment", ["evaluation", "samples"])
def test_a_killed_evaluation_goes_on(tmp_path, moment):
    """8 problems in groups of 2: killed within the third group."""
    argv = ["eval", "--model", "tiny:student", "--data", "tiny", "--limit", "8", "--samples", "2"]
    argv += ["--batch_size", "4", "--max_new_tokens", "16"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert run(CLI, [*argv, "--output", str(whole)])[0] == 0
    kill_at(moment, {"evaluation": 11, "samples": 6}[moment], [*argv, "--output", str(folder)])
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    assert 4 <= len(lines) <= 6 and lines[-1].endswith(b"\n") == (moment == "evaluation")
    assert not (folder / "summary.json").exists()
    assert run(CLI, [*argv, "--output", str(folder)])[0] == 0
    for name in ("samples.jsonl", "summary.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
