"""The memory of a program that runs on fake tensors: they have a shape and a dtype, and hold no data.

Every tensor that an operation returns is counted for as long as its storage lives, so what is measured is the
program itself: whatever an architecture, a loss or an optimiser keeps, for as long as it keeps it.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oprd.preflight.planning.parts import GATHERED, HOST

ROW_BYTES = 2**20


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds data, and is not fake."""
    return not isinstance(tensor, FakeTensor)


class Footprint(TorchDispatchMode):
    """Counts the bytes that live on a device while it is active, by the part of the program that made them.

    Rows are chosen by their values, so what is computed from real tensors is real too, unless it is larger
    than these and `row_bytes`, as masks are that pair rows with rows. Storages that are emptied and filled
    again are those of unsharded layers.
    """

    def __init__(self, device: torch.device, row_bytes: int = ROW_BYTES) -> None:
        super().__init__()
        self._device, self._shapes = device, FakeTensorMode(allow_non_fake_inputs=True)
        self._row_bytes = row_bytes
        self._held: dict[int, tuple[str, int]] = {}
        self._unread: dict[int, tuple[Tensor, str]] = {}
        self._parts = [HOST]
        self._live: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()

    def without_values(self, model: nn.Module, device: torch.device) -> list[Tensor]:
        """Turn the weights of `model`, on the meta device, into fake tensors on `device`; returns them."""
        made: dict[int, Tensor] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        with self._shapes:
                            shape = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        is_weight = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if is_weight else shape
                    tensors[name] = made[id(tensor)]  # type: ignore[assignment]
        return list(made.values())

    def hold(self, tensor: Tensor, part: str) -> None:
        """Count a tensor, of a sharded one this rank's shard, under `part` from now on."""
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if tensor.device.type != self._device.type:
            return
        if key in self._held:
            self._live[self._held[key][0]] -= size
        else:
            weakref.finalize(storage, self._release, key)
        self._held[key] = part, size
        self._live[part] += size
        self._note_peak()

    def hold_when_read(self, tensor: Tensor, part: str) -> None:
        """Count a tensor that is mapped from a file once more of it is read than some rows."""
        self._unread[tensor.untyped_storage()._cdata] = tensor, part

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what the block makes under `name`."""
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.pop()

    @property
    def is_unread(self) -> bool:
        """Whether something that is mapped from a file has not been read so far."""
        return bool(self._unread)

    @property
    def live_bytes(self) -> int:
        """Bytes that live now."""
        return self._live.total()

    def peak_of(self, program: Callable[[], Any]) -> dict[str, int]:
        """Bytes by part at the moment of `program` at which they are most."""
        self._peak.clear()
        self._note_peak()
        with self:
            program()
        return {part: size for part, size in self._peak.items() if size > 0}

    def __enter__(self) -> Any:
        resize = self._resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._recount(storage)
            return result

        # The one way in which FSDP frees unsharded layers, which no operation shows.
        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)  # asked for as often as all that makes something
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, DTensor) for x in given):
            return NotImplemented  # what it does with its shards is counted in turn
        if active_fake_mode() is not None:
            return func(*args, **(kwargs or {}))  # a sharded tensor asks what shape a result will have
        if self._unread and func is not torch.ops.aten.embedding.default:
            for tensor in given:
                if found := self._unread.pop(tensor.untyped_storage()._cdata, None):
                    self.hold(*found)
        if func is torch.ops.c10d._reduce_scatter_base_.default and self._device.type == "cpu":
            self._note_beside(given[1].nbytes)  # gloo sums all of it, in a copy
        result = self._run(func, args, kwargs or {}, given)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                key = leaf.untyped_storage()._cdata
                if key not in self._held and key not in self._unread:
                    self.hold(leaf, self._parts[-1])
        return result

    def _run(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        if func is torch.ops.aten.empty.memory_format and kwargs.get("dtype", torch.float).is_floating_point:
            with self._shapes:
                return func(*args, **kwargs)  # a layer will be unsharded there
        if all(map(has_values, given)):
            largest = max([self._row_bytes, *(x.nbytes for x in given)])
            with suppress(DynamicOutputShapeException, DataDependentOutputException), self._shapes:
                shapes = func(*args, **kwargs)
                if any(x.nbytes > largest for x in tree_leaves(shapes) if isinstance(x, Tensor)):
                    return shapes
        return func(*args, **kwargs)

    def _recount(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held and self._held[key][1] != size:
            self._release(key)
            self._held[key] = GATHERED, size
            self._live[GATHERED] += size
            self._note_peak()

    def _note_beside(self, size: int) -> None:
        """Count `size` bytes that live for a moment."""
        self._live[self._parts[-1]] += size
        self._note_peak()
        self._live[self._parts[-1]] -= size

    def _release(self, key: int) -> None:
        part, size = self._held.pop(key)
        self._live[part] -= size

    def _note_peak(self) -> None:
        if self._live.total() > self._peak.total():
            self._peak = self._live.copy()
