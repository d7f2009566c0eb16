"""The bytes that live while a program runs on fake tensors: these have shape and dtype, and hold no data.

Every tensor that an operation returns counts for as long as its storage lives. torch's `MemTracker` counts
the same bytes, but raises at frozen weights and at a model's second forward (docs/log.md).
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from oprd.foundation.foreign.torch import (
    BY_VALUES,
    SUM_AND_SHARE,
    FakeTensorMode,
    TorchDispatchMode,
    active_fake_mode,
    is_fake,
    storage_id,
    storages_watched,
    tree_leaves,
)

# The parts of memory are the rows of the plan's table, in order.
PROCESS, STUDENT, TEACHER = "process and libraries", "student's weights", "teacher's weights"
REFERENCE, GRADIENTS, OPTIMISER = "bridge, anchor, reference", "student's gradients", "optimiser's state"
BUCKETS, GATHERED, ENGINE = "DDP's buckets", "unsharded layers", "vLLM"
SAMPLING, ACTIVATIONS = "cache and sampling", "activations and losses"
MODELS = PROCESS, STUDENT, TEACHER, REFERENCE, GRADIENTS, OPTIMISER
ORDER = (*MODELS, BUCKETS, GATHERED, ENGINE, SAMPLING, ACTIVATIONS)
REAL_BYTES = 2**28  # larger is no list of rows, but a mask that pairs rows with rows


class Footprint(TorchDispatchMode):
    """Counts the bytes that live on a device, by the part of the program that made them.

    Rows are chosen by their values, so what is computed from real tensors is real too, up to `REAL_BYTES`.
    Models are made without values within `shapes`. With `gloo`, gradients are summed in a copy.
    """

    def __init__(self, device: torch.device, gloo: bool = False) -> None:
        super().__init__()
        self.shapes = FakeTensorMode(allow_non_fake_inputs=True)
        self.live: Counter[str] = Counter()
        self._device, self._gloo, self._part = device, gloo, ACTIVATIONS
        self._held: dict[int, tuple[str, int]] = {}
        self._peak: Counter[str] = Counter()

    def hold(self, part: str, *tensors: Tensor) -> None:
        """Count tensors, of sharded ones this rank's shards, under `part` from now on."""
        for tensor in tensors:
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            if tensor.device.type == self._device.type:
                if storage_id(storage) not in self._held:
                    weakref.finalize(storage, self._release, storage_id(storage))
                self._count(storage, part)

    def hold_model(self, part: str, model: nn.Module) -> None:
        """Count a model's weights and buffers under `part` from now on."""
        self.hold(part, *model.parameters(), *model.buffers())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what the block makes under `name`, and not under `ACTIVATIONS`."""
        self._part = name
        yield
        self._part = ACTIVATIONS

    def peak_of(self, program: Callable[[], Any]) -> dict[str, int]:
        """Bytes by part at the moment of `program` at which they are most."""
        self._peak = self.live.copy()
        with storages_watched(self._gathered), self:
            program()
        return {part: size for part, size in self._peak.items() if size > 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, DTensor) for x in given):
            return NotImplemented  # what it does with its shards is counted in turn
        if func is torch.ops.prim.device.default or active_fake_mode() is not None:
            return func(*args, **(kwargs or {}))  # a question: of a device, or of a result's shape
        if self._gloo and func is SUM_AND_SHARE:
            with self.shapes:
                self.hold(self._part, torch.empty_like(given[1]))
        result = self._run(func, args, kwargs or {}, given)
        made = (x for x in tree_leaves(result) if isinstance(x, Tensor))
        self.hold(self._part, *(x for x in made if storage_id(x.untyped_storage()) not in self._held))
        return result

    def _run(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        if func is torch.ops.aten.empty.memory_format and kwargs.get("dtype", torch.float).is_floating_point:
            with self.shapes:
                return func(*args, **kwargs)  # a layer will be unsharded there
        if not any(is_fake(x) for x in given):
            with suppress(*BY_VALUES), self.shapes:
                shapes = func(*args, **kwargs)
                if any(x.nbytes > REAL_BYTES for x in tree_leaves(shapes) if isinstance(x, Tensor)):
                    return shapes
        return func(*args, **kwargs)

    def _gathered(self, storage: torch.UntypedStorage) -> None:
        """Count a layer that FSDP has unsharded, or freed, anew."""
        if storage_id(storage) in self._held:
            self._count(storage, GATHERED)

    def _count(self, storage: torch.UntypedStorage, part: str) -> None:
        if storage_id(storage) in self._held:
            self._release(storage_id(storage))
        self._held[storage_id(storage)] = part, storage.nbytes()
        self.live[part] += storage.nbytes()
        if self.live.total() > self._peak.total():
            self._peak = self.live.copy()

    def _release(self, key: int) -> None:
        part, size = self._held.pop(key)
        self.live[part] -= size
