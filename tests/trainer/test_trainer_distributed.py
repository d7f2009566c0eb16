"""Two processes on halves of the batch do what one process does on all of it."""

import os
import subprocess
import sys
from pathlib import Path

import ddp_worker
import pytest
import torch
from safetensors.torch import load_file

from oprd.recorder import read_metrics


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, student, teacher):
    output = tmp_path_factory.mktemp("two_ranks")
    worker = Path(ddp_worker.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(worker), student, teacher, str(output)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{worker.parent}:{os.getenv('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2500:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize("case", ddp_worker.CASES)
def test_two_processes_equal_one(two_ranks, tmp_path, student, teacher, case):
    trainer = ddp_worker.run_case(case, student, teacher, tmp_path, processes=1)
    assert trainer.accelerator.num_processes == 1
    alone = read_metrics(tmp_path / case / "metrics.jsonl")
    together = read_metrics(two_ranks / case / "metrics.jsonl")
    assert [record["step"] for record in together] == [1, 2, 3]
    skipped = ("time/", "memory/")
    for one, two in zip(alone, together, strict=True):
        names = {name for name in one if not name.startswith(skipped)}
        assert names == {name for name in two if not name.startswith(skipped)}
        for name in names:
            assert two[name] == pytest.approx(one[name], rel=2e-5, abs=1e-7), name
    if case.startswith("idle_rank"):
        assert [record["rollout/left_out"] for record in together] == [2, 2, 2]
        assert all(record["grad_norm"] > 0 for record in together)
    weights = [load_file(folder / case / "model.safetensors") for folder in (tmp_path, two_ranks)]
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, rtol=1e-5, atol=1e-6)
