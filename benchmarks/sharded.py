"""What does a rank hold of a teacher that two ranks share, and what does sharing it take?

    python benchmarks/sharded.py      # results/sharded.csv

A teacher of 24 layers, 768 wide, in float32 reads the same rollouts on each of two gloo ranks, in two arms:
`whole` on every rank, and `sharded` by layer (FSDP2). Resident memory over what a rank held before it had the
teacher, at rest and at the most; seconds are those of gloo on one machine and say nothing of NCCL. What a
sharded forward takes beyond its shards is the largest unit, twice: a block, or a large embedding.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from harness import hardware, write
from transformers import Qwen3Config, Qwen3ForCausalLM

from oprd.foundation.meters import MemoryMeter, resident_mb
from oprd.foundation.ranks import leave_ranks
from oprd.models.forward import ModelInput, StateRequest
from oprd.models.sharding.fsdp import Sharding
from oprd.models.teacher import Teacher

ARMS, REPEATS, VOCABULARIES, LAYERS = ("whole", "sharded"), 5, (2_000, 32_000), 24
BATCH, TOKENS = 2, 256
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
# Freed blocks go back at once, or resident memory would tell of malloc and not of the teacher.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}


def measure(arm: str, vocabulary: int) -> dict[str, float]:
    """What this rank holds of the teacher and takes to read with it, in 10⁶ bytes and seconds."""
    device = torch.device("cpu")
    ids = torch.randint(vocabulary, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    model_input = ModelInput(ids, torch.ones_like(ids), 0, TOKENS)
    requests = [
        StateRequest(tuple(range(1, LAYERS + 1)), torch.ones(BATCH, TOKENS, dtype=torch.bool).tril(), True)
    ]
    gc.collect()
    before = resident_mb("VmRSS")
    torch.manual_seed(0)
    teacher = Teacher(Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **SIZES)))
    sharding = Sharding(None, device, True, weights_from_rank_0=False) if arm == "sharded" else None
    teacher.place(device, sharding)
    gc.collect()
    resting, seconds, meter = resident_mb("VmRSS") - before, [], MemoryMeter(device)
    meter.start()
    for _ in range(REPEATS):
        began = time.perf_counter()
        states = teacher.read(model_input, requests)
        seconds.append(time.perf_counter() - began)
        del states
    most = meter.read()["memory/peak_mb"] - before
    return {"resting_mb": resting, "most_mb": most, "seconds": statistics.median(seconds)}


def rank(arm: str, vocabulary: int) -> None:
    """One of the two ranks: the first one prints what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured = measure(arm, vocabulary)
    if dist.get_rank() == 0:
        print(json.dumps(measured))
    dist.barrier()
    leave_ranks()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sharded.csv")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(args.rank[0], int(args.rank[1]))
        return
    rows = []
    for arm, vocabulary in ((arm, size) for size in VOCABULARIES for arm in ARMS):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [*launcher, __file__, "--rank", arm, str(vocabulary)],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append(
            {"arm": arm, "vocabulary": vocabulary, **json.loads(done.stdout.splitlines()[-1]), **hardware()}
        )
        print(rows[-1])
    write(args.output, rows)


if __name__ == "__main__":
    main()
