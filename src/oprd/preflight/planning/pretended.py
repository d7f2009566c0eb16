"""One rank of many without the others: its student sharded by accelerate's own code, its messages unsent."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from oprd.foundation.errors import UserError
from oprd.models.sharding.fsdp import Sharding
from oprd.preflight.planning.machine import Machine

AXIS = "ranks"


@contextmanager
def pretended_ranks(machine: Machine) -> Iterator[DeviceMesh | None]:
    """The mesh of a sharded run's ranks, none of which answers; None for a run that is not sharded.

    Raises `UserError` under a launcher of another number of ranks.
    """
    if not machine.sharded or machine.ranks == 1:
        yield None
        return
    is_launched = dist.is_initialized()
    if is_launched and dist.get_world_size() != machine.ranks:
        raise UserError(
            f"{dist.get_world_size()} ranks were launched: plan for {machine.ranks} without a launcher"
        )
    if not is_launched:
        dist.init_process_group("fake", rank=0, world_size=machine.ranks)
    try:
        group: Any = dist.new_group(backend="fake")
        yield DeviceMesh.from_group(group, machine.device.type, mesh_dim_names=(AXIS,))
    finally:
        if not is_launched:
            dist.destroy_process_group()


def shard_student(model: nn.Module, settings: Any, mesh: DeviceMesh, device: torch.device) -> Sharding:
    """Shard `model` in place as accelerate will for a run of `settings`; how the frozen models follow.

    Raises `UserError` as the run would.
    """
    plugin = _plugin(settings)
    precision = "bf16" if settings.bf16 else "fp16" if settings.fp16 else "no"
    if precision != "no":
        plugin.set_mixed_precision(precision)
    launched: Any = SimpleNamespace(  # an Accelerator, as far as it is asked
        state=SimpleNamespace(fsdp_plugin=plugin),
        distributed_type=DistributedType.FSDP,
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=(AXIS,)),
        mixed_precision=precision,
        is_main_process=False,
        device=device,
    )
    sharding = Sharding.of(launched)
    assert sharding is not None
    if plugin.activation_checkpointing:
        plugin.set_auto_wrap_policy(model)
        model = fsdp2_apply_ac(launched, model)
    fsdp2_prepare_model(launched, model)
    return sharding


def _plugin(settings: Any) -> FullyShardedDataParallelPlugin:
    """FSDP as the recipe or else the launcher asks for it, or as it is by default."""
    asked = settings.fsdp_plugin_args
    if asked is None:
        by_default = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap"}
        asked = {} if parse_flag_from_env("ACCELERATE_USE_FSDP") else by_default
    plugin = FullyShardedDataParallelPlugin(**asked)
    plugin.cpu_ram_efficient_loading = False  # there is nothing to load
    return plugin
