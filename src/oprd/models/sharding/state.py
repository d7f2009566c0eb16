"""Weights and optimiser state of a sharded run, in the very files of an unsharded one.

So any number of ranks resumes what any other number has saved, and a checkpoint loads like any model.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """All weights, on the host; all ranks have to ask, and those that do not `keep` them get none."""
    return _whole(model.state_dict(keep_vars=True), keep)


def whole_optimizer_state(optimizer: Any, keep: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` as one process would have it; see `whole_weights`."""
    saved = optimizer.state_dict()
    return saved | {"state": {index: _whole(state, keep) for index, state in saved["state"].items()}}


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Take this rank's shards, or all, out of the weights or adapters that were saved in `folder`."""
    if not isinstance(model, PeftModel):
        # Files may name weights differently from the model, as those of experts; its code may be the user's.
        kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
        saved = kind.from_pretrained(folder, dtype=next(model.parameters()).dtype).state_dict()
        targets = model.state_dict()
        for name, value in saved.items():
            targets[name].copy_(_sharded(value, targets[name]))
        return
    targets = get_peft_model_state_dict(model)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            targets[name].copy_(_sharded(file.get_tensor(name), targets[name]))


def load_optimizer_state(optimizer: Any, path: Path) -> None:
    """Take this rank's shards out of what `whole_optimizer_state` gave, or an unsharded run saved."""
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in saved["state"].items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameters[index].shape:
                state[name] = _sharded(value, parameters[index])
    optimizer.load_state_dict(saved)


def _whole(tensors: dict[str, Any], keep: bool) -> dict[str, Any]:
    whole: dict[int, Any] = {}
    for value in tensors.values():
        if id(value) in whole:  # tied weights stay one
            continue
        full = whole_tensor(value) if isinstance(value, DTensor) else value
        if keep:
            whole[id(value)] = full.detach().cpu() if torch.is_tensor(full) else full
        else:
            whole[id(value)] = None
    return {name: whole[id(value)] for name, value in tensors.items()} if keep else {}


def whole_tensor(shards: Any) -> Tensor:
    """All of a sharded tensor, without gradient, where the ranks can exchange it and not in host memory."""
    return shards.detach().to(shards.device_mesh.device_type).full_tensor()


def _sharded(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    kind = like.device_mesh.device_type
    shards = distribute_tensor(value.to(kind), like.device_mesh, like.placements, src_data_rank=None)
    return shards.to(like.device)
