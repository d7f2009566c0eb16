"""One of two processes that each see some of the rollouts: `gather_worker.py RANK OUTPUT`."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import reference_fit as reference
from oprd.bridge import BridgeFitter
from oprd.bridge.held_out import is_held_out, rollout_hash
from oprd.foundation.errors import UserError
from oprd.foundation.ranks import leave_ranks
from oprd.objective.selection import LayerMap

NUM_ROWS, ROLLOUT, HOLDOUT = 400, 8, 0.2
LAYERS = LayerMap(((1, 2), (3, 2)))  # two student layers with one of the teacher's
# Rank 0 sees the rollouts before this one; or, for `apart`, those that are not held out.
CASES = {"halves": 25, "uneven": 41, "empty_update": 50, "no_update": 50, "apart": None, "constant": 13}


def fitter_of(case: str, rank: int | None, wider: int = 0) -> BridgeFitter:
    """A fitter that has seen the rows of `rank`, or of both ranks."""
    deep, teacher = reference.make_rows(NUM_ROWS, 6, 5, seed=1)
    shallow, _ = reference.make_rows(NUM_ROWS, 4, 5, seed=2)
    if case == "constant":
        deep[:, 2], teacher[:, 1] = 0.1, 1e4 / 3
    ids = np.arange(NUM_ROWS) // ROLLOUT
    # A constant dimension does what an offset does, so choosing between the two would be a tie.
    options = {"affine": True, "standardize": True} if case == "constant" else {}
    fitter = BridgeFitter(LAYERS, holdout=HOLDOUT, **options)
    held_out = is_held_out(rollout_hash(torch.from_numpy(ids)), HOLDOUT).numpy()
    first = ~held_out if CASES[case] is None else ids < CASES[case]
    mine = slice(None) if rank is None else first if rank == 0 else ~first
    if case == "no_update" and rank == 1:
        return fitter
    rows = [torch.from_numpy(x[mine]).float() for x in (shallow, deep, teacher)]
    rows[1] = torch.nn.functional.pad(rows[1], (0, wider))
    fitter.update({1: rows[0], 3: rows[1]}, {2: rows[2]}, ids[mine])
    return fitter


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, output = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{output}/meeting", rank=rank, world_size=2)
    for case in CASES:
        fitter = fitter_of(case, rank)
        fitter.gather()
        fitter.fit(3).save(output / f"{case}-{rank}.safetensors")
    try:
        fitter_of("halves", rank, wider=rank).gather()
    except UserError as error:
        (output / f"refused-{rank}").write_text(str(error))
    leave_ranks()
