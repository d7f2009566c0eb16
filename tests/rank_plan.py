"""A memory plan beside its dry run on every rank, under torchrun: `rank_plan.py RECIPE ddp|fsdp`.

The first rank prints planned and measured MB as JSON. accelerate shards on CPU only if misled.
"""

import json
import os
import sys
from dataclasses import replace

if __name__ == "__main__" and sys.argv[2] == "fsdp":
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from oprd.doctor import longest_rollout
from oprd.dry_run import PEAKS, dry_run
from oprd.machine import Machine
from oprd.memory_plan import plan_memory
from oprd.train import parse_training_recipe


def main() -> None:
    sharded = sys.argv[2] == "fsdp"
    run, config = parse_training_recipe(sys.argv[1], ["--ddp_backend", "gloo"])
    _ = config.device  # makes the process group
    if sharded:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    longest, _ = longest_rollout(run, config, config.world_size)
    machine = replace(Machine.here(config), sharded=sharded)
    plan = plan_memory(run.model_name_or_path, config, longest, machine, run.lora)
    peaks = dry_run(run.model_name_or_path, config, longest, plan.step, peft_config=run.lora)
    if config.process_index == 0:
        planned = dict(zip(PEAKS, (plan.update_mb, plan.rollout_mb), strict=True))
        parts = {"update": plan.update, "rollout": plan.rollout}
        print(json.dumps({"planned": planned, "measured": peaks, "parts": parts}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
