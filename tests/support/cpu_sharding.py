"""FSDP2 on CPU ranks: accelerate shards there only when told that it is not one."""

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType


def ask_for_fsdp(from_rank_0: bool = False) -> None:
    """What accelerate's launcher would say, before anything reads it."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": str(from_rank_0).lower(),
    }


def shard_on_cpu(args: Any) -> None:
    """Let the ranks of `args`, which are there from now on, pass for accelerators."""
    _ = args.device
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
