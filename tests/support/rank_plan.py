"""A memory plan beside its dry run on every rank, under torchrun: `rank_plan.py RECIPE ddp|fsdp`.

The first rank prints planned and measured MB as JSON.
"""

import json
import sys
from dataclasses import replace

import torch

from cpu_sharding import ask_for_fsdp, shard_on_cpu
from oprd.foundation.ranks import leave_ranks
from oprd.preflight.doctor import longest_rollout
from oprd.preflight.dry_run import PEAKS, dry_run
from oprd.preflight.planning import memory_plan
from oprd.preflight.planning.machine import Machine
from oprd.training.train import parse_training_recipe


def main() -> None:
    sharded = sys.argv[2] == "fsdp"
    if sharded:
        ask_for_fsdp()
    run, config = parse_training_recipe(sys.argv[1], ["--ddp_backend", "gloo"])
    if sharded:
        shard_on_cpu(config)
    longest, _ = longest_rollout(run, config, config.world_size)
    machine = replace(Machine.here(config), sharded=sharded)
    plan = memory_plan.plan_memory(run.model_name_or_path, config, longest, machine, run.lora)
    peaks = dry_run(run.model_name_or_path, config, longest, plan.step, peft_config=run.lora)
    if config.process_index == 0:
        planned = dict(zip(PEAKS, (plan.update_mb, plan.rollout_mb), strict=True))
        parts = {"update": plan.update, "rollout": plan.rollout}
        print(json.dumps({"planned": planned, "measured": peaks, "parts": parts}))
    leave_ranks()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
