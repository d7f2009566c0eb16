"""A run's models on the meta device, its optimiser and, where ranks share them, a fake process group."""

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
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from oprd.foundation.errors import UserError
from oprd.models.activation_checkpointing import checkpoint_blocks
from oprd.models.files import CONFIGS, told_of
from oprd.models.init_kwargs import hub_kwargs, reference_kwargs, student_kwargs, teacher_kwargs
from oprd.models.loading import base_model, resolve_model
from oprd.models.precision import Precision, store_products_in
from oprd.models.sharding.fsdp import Sharding
from oprd.preflight.planning.machine import Machine

AXIS = "ranks"


class _EightBit(torch.optim.Optimizer):
    """The state of bitsandbytes' optimisers: two bytes a weight, and two float32 scales for 256 of them."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for weight in self.param_groups[0]["params"]:
            size = 2 * weight.numel() + 8 * -(-weight.numel() // 256)
            self.state[weight] = self.state[weight] or {"state": weight.new_zeros(size, dtype=torch.uint8)}


def make_optimizer(settings: Any, student: Any, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a run; raises `UserError` for one that cannot be had."""
    if "8bit" in settings.optim:
        return _EightBit(trained, {})
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(settings, student)
    except (ImportError, ValueError) as error:
        raise UserError(f"optim: {settings.optim}: {error}") from error
    return kind(trained, **kwargs)


def make_student(name: str, settings: Any, peft_config: Any = None) -> Any:
    """The student of a run in train mode, with its adapters; its blocks checkpoint as the run's would."""
    given = {"dtype": "float32"} | student_kwargs(settings)
    model = _from_config(resolve_model(name, **hub_kwargs(given)), given)
    if peft_config is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, peft_config)
        if settings.gradient_checkpointing:
            model.enable_input_require_grads()
    if settings.gradient_checkpointing:
        checkpoint_blocks(model, settings.gradient_checkpointing_kwargs)
    return model.train()


def make_teacher(settings: Any, precision: Precision) -> Any:
    """The teacher of a run, in the dtype that the run would load it in."""
    return _make_frozen(settings.teacher_model_name_or_path, teacher_kwargs(settings), settings, precision)


def make_reference(settings: Any, precision: Precision) -> Any:
    """The model that targets are extrapolated from, if the recipe names one."""
    name = settings.reference_model_name_or_path
    return None if name is None else _make_frozen(name, reference_kwargs(settings), settings, precision)


def _make_frozen(name: str, given: dict[str, Any], settings: Any, precision: Precision) -> Any:
    located = base_model(resolve_model(name, **hub_kwargs(given)))
    config = AutoConfig.from_pretrained(located, **hub_kwargs(given))
    dtype = precision.of_teacher(config, settings.teacher_quantization != "none")
    model = _from_config(located, {"dtype": dtype} | given)
    if "dtype" not in given and precision.autocast:
        store_products_in(config.dtype, model, is_exact=True)
    return model


def _from_config(located: str, given: dict[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(located, **hub_kwargs(given))
    dtype = given["dtype"]
    if dtype in ("auto", None):
        dtype = config.dtype or torch.float32
    kwargs = {key: given[key] for key in ("attn_implementation", "trust_remote_code") if key in given}
    with told_of("the model", located, CONFIGS), torch.device("meta"):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)


@contextmanager
def fake_ranks(machine: Machine) -> Iterator[DeviceMesh | None]:
    """The mesh of a sharded run's ranks, none of which answers; None for a run that is not sharded.

    Raises `UserError` under a launcher of another number of ranks.
    """
    if not machine.sharded or machine.ranks == 1:
        yield None
        return
    is_launched = dist.is_initialized()
    if not is_launched:
        dist.init_process_group("fake", rank=0, world_size=machine.ranks)
    try:
        if (launched := dist.get_world_size()) != machine.ranks:
            raise UserError(f"{launched} ranks were launched: plan for {machine.ranks} without a launcher")
        group: Any = dist.new_group(backend="fake")
        yield DeviceMesh.from_group(group, machine.device.type, mesh_dim_names=(AXIS,))
    finally:
        if not is_launched:
            dist.destroy_process_group()


def shard_student(model: nn.Module, settings: Any, mesh: DeviceMesh, device: torch.device) -> Sharding:
    """Shard `model` in place as accelerate will for a run of `settings`; how the frozen models follow.

    FSDP is as the recipe or else the launcher asks for it. Raises `UserError` as the run would.
    """
    by_default = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap"}
    asked = {} if parse_flag_from_env("ACCELERATE_USE_FSDP") else by_default
    plugin = FullyShardedDataParallelPlugin(**(settings.fsdp_plugin_args or asked))
    plugin.cpu_ram_efficient_loading = False  # there is nothing to load
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
