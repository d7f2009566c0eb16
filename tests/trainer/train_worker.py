"""`oprd train` on CPU ranks, sharded by FSDP2 or not: `train_worker.py ddp|fsdp RECIPE FLAG…`."""

import os
import sys

if sys.argv[1] == "fsdp":
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from oprd.train import parse_training_recipe, train

torch.set_num_threads(1)
run, config = parse_training_recipe(sys.argv[2], [*sys.argv[3:], "--ddp_backend", "gloo"])
if sys.argv[1] == "fsdp":
    _ = config.device
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # or accelerate shards nothing
train(run, config)
torch.distributed.destroy_process_group()
