"""Losses, logits and weights that are not finite: the error names the step, the layer, the parameter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from oprd.foundation.errors import Fault, UserError
from oprd.foundation.foreign.deepspeed import is_partitioned, partition
from oprd.foundation.foreign.torch import is_fake

COMPUTED_IN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class NonFiniteLoss(RuntimeError):
    """A loss that is not finite: which one, and the rollouts that it came from."""

    def __init__(self, message: str, rollouts: list[Int[Tensor, " S"]]) -> None:
        super().__init__(message)
        self.rollouts = rollouts


@dataclass(frozen=True)
class _Note:
    what: str
    layer: int | None
    finite: Bool[Tensor, " N"]
    mask: Bool[Tensor, "B T"]
    input_ids: Int[Tensor, "B S"]


class FiniteWatch:
    """Records whether a step's row losses are finite; read once a step, since that waits for the device."""

    def __init__(self) -> None:
        self._notes: list[_Note] = []

    def add(
        self,
        what: str,
        layer: int | None,
        values: Float[Tensor, " N"],
        mask: Bool[Tensor, "B T"],
        input_ids: Int[Tensor, "B S"],
    ) -> None:
        """Note the values of the rows of `mask`, of rollouts that read `input_ids`."""
        self._notes.append(_Note(what, layer, values.detach().isfinite(), mask, input_ids))

    def clear(self) -> None:
        """Forget what was noted."""
        self._notes = []

    def check(self) -> None:
        """Raise `NonFiniteLoss` if a value since the last check was not finite, and forget them all."""
        notes, self._notes = self._notes, []
        if not notes:
            return
        whole = torch.stack([note.finite.all().to(notes[0].finite.device) for note in notes]).tolist()
        broken = [note for note, good in zip(notes, whole, strict=True) if not good]
        if broken:
            raise _told([note for note in broken if note.what == broken[0].what])


def _told(notes: list[_Note]) -> NonFiniteLoss:
    """One error for all layers, with the rollouts of the first micro-batch."""
    first = notes[0]
    layers = sorted({note.layer for note in notes if note.layer is not None})
    where = f"at layers {layers}" if layers else "behind the last layer"
    rows = first.mask.nonzero()[:, 0][~first.finite.to(first.mask.device)]
    rollouts = [first.input_ids[i] for i in sorted(set(rows.tolist()))]
    return NonFiniteLoss(f"{first.what} is not finite {where}", rollouts)


def check_loaded(model: nn.Module, who: str) -> None:
    """Raise `UserError` for a model that comes with weights that are not finite; `who` names it."""
    if name := _first_not_finite(model):
        raise UserError(
            f"the weights of {who} are not finite: {name} holds NaN or infinity; use another model"
        )


def check_trained(model: nn.Module, step: int) -> None:
    """Raise `Fault` if training left a weight that is not finite.

    Of a sharded model every rank asks, and raises for all of them; otherwise each has all weights.
    """
    here = [_first_not_finite(model)]
    weight = next(model.parameters())
    is_sharded = isinstance(weight, DTensor) or is_partitioned(weight)
    found = [name for name in (gather_object(here) if is_sharded else here) if name]
    if found:
        raise Fault(
            f"step {step}: the student's weights are not finite ({found[0]} is the first), so they are not "
            "saved; checkpoints are from before: lower the learning rate"
        )


@contextmanager
def finite_logits(model: Any, who: str) -> Iterator[None]:
    """Within it a forward of `model`, called `who`, raises `Fault` if its logits are not finite."""
    causal = getattr(model, "get_base_model", lambda: model)()

    def check(_module: nn.Module, _args: Any, output: Any) -> None:
        if not bool((output.logits < torch.inf).all()):  # −∞ rules a token out
            name = _first_not_finite(model)
            cause = f"its weights are not: {name} is the first" if name else "a smaller dtype than it needs?"
            raise Fault(f"{who}'s logits are not finite ({cause})")

    hook = causal.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _first_not_finite(model: nn.Module) -> str | None:
    """The first weight, of what this process holds, that is not finite all through; waits once per device."""
    checked = [
        (name, torch.stack(torch.aminmax(values)).isfinite().all())
        for name, parameter in model.named_parameters()
        if (values := _held(parameter)) is not None
    ]
    found = None
    for _, group in groupby(checked, key=lambda item: item[1].device):
        names, finite = zip(*group, strict=True)
        found = found or next(
            (name for name, good in zip(names, torch.stack(finite).tolist(), strict=True) if not good), None
        )
    return found


def _held(parameter: nn.Parameter) -> Tensor | None:
    """This process's part of a weight that is computed with as it is: not quantised, not elsewhere."""
    local = partition(parameter)
    local = local.to_local() if isinstance(local, DTensor) else local
    is_here = not is_fake(local) and not local.is_meta and local.numel() > 0
    return local.detach() if is_here and local.dtype in COMPUTED_IN else None
