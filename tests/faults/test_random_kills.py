"""Twenty kills at random moments of the wall clock, over five objectives."""

import os
import random
import signal
import subprocess
import time

import pytest

from killing import CLI, assert_same_run, finish, flags, start
from oprd.folders.claims import is_finished

pytestmark = pytest.mark.drill

SEED = os.environ["DRILL_SEED"]  # conftest.py draws it

KILLS, STEPS = 4, 24
LONGER = {"max_steps": STEPS, "save_steps": 3, "save_total_limit": 2, "max_completion_length": 16}
OBJECTIVES = {
    "vanilla": ("vanilla", {}),
    "composite": (
        "composite",
        {
            "representation_weight": "0=1,11=1,12=0",
            "output_weight": "0=0,11=0,12=1",
            "diagnostics_steps": 5,
            "accuracy_dataset_name": "tiny",
            "accuracy_steps": 4,
            "accuracy_problems": 4,
            "accuracy_samples": 2,
        },
    ),
    "bridge": ("through_bridge", {"anchor_weight": 1}),
    "packed": ("top_k", {"max_tokens_per_micro_batch": 80, "dataloader_num_workers": 1, "use_peft": True}),
    "text": ("sampled_text", {}),
}


def timed(argv, folder):
    """Run without a kill; returns the seconds until the first step began, and all of them."""
    began = time.monotonic()
    process = start(CLI, argv)
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    prepared = time.monotonic() - began
    _, said = process.communicate()
    assert process.returncode == 0 and is_finished(folder, STEPS), said[-3000:]
    return prepared, time.monotonic() - began


def kill_after(seconds, argv):
    """Kill a run, which may not fail by itself, after so many seconds; returns whether it still ran."""
    process = start(CLI, argv)
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said[-3000:]
    return process.returncode != 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_random_kills_leave_no_trace(tmp_path, data, request, objective):
    recipe, changes = OBJECTIVES[objective]
    if objective == "bridge":
        changes = changes | {"bridge": request.getfixturevalue("bridge")}

    def command(folder):
        return ["train", f"recipes/tiny/{recipe}.yaml", *flags(folder, data, **LONGER, **changes)]

    prepared, total = timed(command(tmp_path / "whole"), tmp_path / "whole")
    moments, killed, number = random.Random(f"{SEED} {objective}"), 0, 0
    while killed < KILLS:
        number += 1
        folder, was_running = tmp_path / f"run-{number}", True
        while was_running and killed < KILLS:
            was_running = kill_after(moments.uniform(0.8 * prepared, total), command(folder))
            killed += was_running
        finish(command(folder), folder)
        assert_same_run(folder, tmp_path / "whole", last_step=STEPS)
