"""`oprd train` on CPU ranks, sharded by FSDP2 or not: `train_worker.py ddp|fsdp RECIPE FLAG…`."""

import sys

import torch
from cpu_sharding import ask_for_fsdp, shard_on_cpu

from oprd.ranks import leave_ranks
from oprd.train import parse_training_recipe, train

torch.set_num_threads(1)
if sys.argv[1] == "fsdp":
    ask_for_fsdp()
run, config = parse_training_recipe(sys.argv[2], [*sys.argv[3:], "--ddp_backend", "gloo"])
if sys.argv[1] == "fsdp":
    shard_on_cpu(config)
train(run, config)
leave_ranks()
