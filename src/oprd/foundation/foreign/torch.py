"""What we use of torch that it keeps private."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of fake tensors and of the modes that see each operation there is no public form (tested with 2.13); torch's
# own memory tracker is made of the same names. An operation raises these where its result depends on values.
__all__ = ["FakeTensor", "FakeTensorMode", "TorchDispatchMode", "active_fake_mode", "tree_leaves"]
BY_VALUES = DynamicOutputShapeException, DataDependentOutputException

# The fused kernels of attention, which keep its output and a number per row and head for the backward.
# `create_selective_checkpoint_contexts` (public) takes operators, and these have no public names: until it
# takes `scaled_dot_product_attention`, whichever kernel that calls (tested with 2.13).
ATTENTION_KERNELS = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]

# The operation by which FSDP2 sums gradients; until c10d's operations have public names (tested with 2.13).
SUM_AND_SHARE = torch.ops.c10d._reduce_scatter_base_.default


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values, as in a plan; asking anything of its data would fail.

    Until torch makes `FakeTensor` public (tested with 2.13).
    """
    return isinstance(tensor, FakeTensor)


def storage_id(storage: torch.UntypedStorage) -> int:
    """What two tensors of one storage have in common, whether it holds data or not.

    `data_ptr()` is zero for all fake tensors. Until a storage has a hash (tested with 2.13).
    """
    return storage._cdata


@contextmanager
def storages_watched(resized: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Within it `resized` is told of every storage that changes its size.

    FSDP2 frees the weights that it has gathered by resizing their storage to zero, which no operation shows.
    Until it frees them as tensors (tested with 2.13).
    """
    resize = torch.UntypedStorage.resize_

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        resized(storage)
        return result

    torch.UntypedStorage.resize_ = resize_and_tell  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def note_rates(schedule: Any, rates: list[Any]) -> None:
    """Let a schedule's `get_last_lr` return `rates`, one for each group of its optimiser.

    `step()` alone sets them, and counts a step. Until `load_state_dict` of a schedule sets the rates of its
    optimiser too (tested with 2.13).
    """
    schedule._last_lr = rates
