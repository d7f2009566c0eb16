"""Frozen embeddings and LM heads spread over ranks by the rows of their tables.

Other weights are unsharded when their layer runs (FSDP2). A table is as large as the vocabulary, and a
micro-batch reads a few rows of it: ranks ask each other for these rows alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def shard_tables(modules: Sequence[nn.Module], mesh: DeviceMesh, device: torch.device) -> set[nn.Parameter]:
    """Keep this rank's rows of the frozen parameters of `modules`, on `device`; tied parameters stay tied."""
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    sharded: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, whole in list(module.named_parameters(recurse=False)):
            if id(whole) not in sharded:
                shards = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)
                if not shards.is_meta:
                    shards = DTensor.from_local(
                        shards.to_local().to(device, copy=True),
                        mesh,
                        placements,
                        shape=whole.shape,
                        stride=whole.stride(),
                    )
                sharded[id(whole)] = nn.Parameter(shards, requires_grad=False)
            module.register_parameter(name, sharded[id(whole)])
    return set(sharded.values())


class RowFetcher:
    """Hooks of an embedding with a sharded table: it looks its ids up among the rows that they name."""

    def __init__(self, embedding: Any) -> None:
        self._table, self._padding = embedding.weight, embedding.padding_idx
        embedding.register_forward_pre_hook(self._fetch)
        embedding.register_forward_hook(self._restore, always_call=True)

    @torch.no_grad()
    def _fetch(self, embedding: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wanted, places = args[0].unique(return_inverse=True)
        self._table = embedding.weight
        rows = fetch_rows(self._table, wanted)
        embedding.weight, embedding.padding_idx = nn.Parameter(rows, requires_grad=False), None
        return places, *args[1:]

    def _restore(self, embedding: Any, *_: Any) -> None:
        embedding.weight, embedding.padding_idx = self._table, self._padding


def fetch_rows(table: DTensor, wanted: Int[Tensor, " U"]) -> Float[Tensor, "U D"]:
    """The rows of a table sharded over the last dimension of its mesh; all ranks have to ask for theirs."""
    mesh = table.device_mesh
    group, ranks = mesh.get_group(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    counts = wanted.new_empty(ranks)
    dist.all_gather_into_tensor(counts, wanted.new_tensor([len(wanted)]), group=group)
    asked = wanted.new_full((int(counts.max()),), -1)
    asked[: len(wanted)] = wanted
    all_asked = asked.new_empty(ranks * len(asked))
    dist.all_gather_into_tensor(all_asked, asked, group=group)
    here = table.to_local()
    first = mesh.get_local_rank(mesh.ndim - 1) * -(-len(table) // ranks)
    found = ((all_asked >= first) & (all_asked < first + len(here))).nonzero()[:, 0]
    sent = torch.zeros(len(all_asked), *table.shape[1:], dtype=here.dtype, device=wanted.device)
    sent[found] = here[(all_asked[found] - first).to(here.device)].to(sent)
    received = sent.new_empty(len(asked), *table.shape[1:])
    dist.reduce_scatter_tensor(received, sent, group=group)  # one rank has the row, the others zeros
    return received[: len(wanted)]
