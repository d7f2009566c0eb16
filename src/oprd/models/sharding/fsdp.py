"""Models spread over ranks by FSDP2: frozen ones are sharded here, the student by accelerate.

A sharded model is entered through its root, whose forward gathers a block's weights when the block runs.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from oprd.foundation.errors import UserError
from oprd.models.capture import blocks
from oprd.models.forward import StateReader
from oprd.models.sharding.table import RowFetcher, shard_tables

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharding:
    """How a run spreads its models: over which ranks, and whether rank 0 alone has loaded the weights."""

    mesh: DeviceMesh | None
    device: torch.device
    reshard_after_forward: bool
    weights_from_rank_0: bool
    precision: MixedPrecisionPolicy

    @classmethod
    def of(cls, accelerator: Any) -> "Sharding | None":
        """The sharding that accelerate was launched with, if any; gradients are summed in float32.

        Raises `UserError` for FSDP1.
        """
        if accelerator.distributed_type != DistributedType.FSDP:
            if parse_flag_from_env("ACCELERATE_USE_FSDP"):
                logger.warning(
                    "FSDP is asked for, but nothing is sharded: accelerate needs several accelerators"
                )
            return None
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError("the accelerate config has fsdp_version 1: set fsdp_version: 2")
        if plugin.mixed_precision_policy is not None:
            compute = plugin.mixed_precision_policy.param_dtype
            # accelerate's own policy would sum gradients, and return the loss, in half precision.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32)
        mesh = getattr(accelerator, "torch_device_mesh", None)
        if mesh is not None:
            mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
        sizes = bool(plugin.reshard_after_forward), bool(plugin.cpu_ram_efficient_loading)
        return cls(mesh, accelerator.device, *sizes, plugin.mixed_precision_policy or MixedPrecisionPolicy())

    def shard(self, reader: StateReader, offload: bool = False) -> None:
        """Shard a frozen model in place, block by block; its weights are freed as soon as they were used.

        With `offload` the shards stay in host memory. The embedding fetches the rows that it reads; the LM
        head is unsharded where it is used (`Head.gathered`).
        """
        model: Any = reader.model
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy()
        mesh = self.mesh or init_device_mesh(self.device.type, (dist.get_world_size(),))
        how: dict[str, Any] = {
            "mesh": mesh,
            "offload_policy": policy,
            "reshard_after_forward": True,
            "mp_policy": self.precision,  # as the student computes
        }
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        loaded = model.state_dict() if self.weights_from_rank_0 else None
        tables = shard_tables((embedding, head), mesh, torch.device("cpu") if offload else self.device)
        RowFetcher(embedding)
        for unit in (*blocks(model), reader):
            fully_shard(unit, **how, ignored_params=tables)
        if loaded is not None:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(model, loaded, options=options)

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """The sharded `model`, unsharded on every rank, so that ranks may generate at their own pace."""
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            head = getattr(model, "get_output_embeddings", lambda: None)()
            for unit in units:
                # As accelerate has it: what a step uses last is kept until the backward.
                kept = unit is model or unit is head
                unit.set_reshard_after_forward(self.reshard_after_forward and not kept, recurse=False)
                unit.reshard()
