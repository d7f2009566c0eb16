"""One forward of a backbone over rollouts: what it reads, and which rows of which layers are kept.

Row t, 0-based, is the state that predicts response token t: the last prompt token for t = 0. The
last response token is read by no row, so it is not fed.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from oprd.foundation.errors import UserError
from oprd.models.activation_checkpointing import uncheckpointed
from oprd.models.capture import backbone, capture
from oprd.models.packed import mixing, takes_lengths
from oprd.models.padding import heeds_padding


@dataclass(frozen=True)
class ModelInput:
    """Token ids that a model reads, their mask on the host, and where the response rows lie among them."""

    input_ids: Int[Tensor, "B S"]
    attention_mask: Int[Tensor, "B S"]
    first_row: int
    num_rows: int

    @classmethod
    def of(
        cls,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Int[Tensor, "B P"],
        completion_ids: Int[Tensor, "B T"],
        completion_mask: Int[Tensor, "B T"],
    ) -> "ModelInput":
        """Left-padded prompts and right-padded completions, less the columns that are padding throughout.

        With masks on the host, ids on an accelerator are not waited for.
        """
        skipped = prompt_ids.shape[1] - max(prompt_mask.sum(-1).tolist())
        longest = max(*completion_mask.sum(-1).tolist(), 1)
        ids = torch.cat([prompt_ids[:, skipped:], completion_ids[:, : longest - 1]], dim=1)
        mask = torch.cat([prompt_mask[:, skipped:], completion_mask[:, : longest - 1]], dim=1)
        return cls(ids, mask, prompt_ids.shape[1] - skipped - 1, longest)

    @property
    def is_padded(self) -> bool:
        """Whether any rollout has padding in front."""
        return bool((self.attention_mask[:, 0] == 0).any())

    def part(self, rollouts: Int[Tensor, " N"], padding: int) -> "ModelInput":
        """Some of the rollouts, less the padding that is in front of all of them."""
        ids = self.input_ids[rollouts.to(self.input_ids.device), padding:]
        mask = self.attention_mask[rollouts, padding:]
        return ModelInput(ids, mask, self.first_row - padding, self.num_rows)

    def rows(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B S"]:
        """A mask over response rows as a mask over the sequence."""
        placed = torch.zeros(self.input_ids.shape, dtype=torch.bool, device=mask.device)
        placed[:, self.first_row : self.first_row + self.num_rows] = mask[:, : self.num_rows]
        return placed

    def to(self, device: torch.device) -> "ModelInput":
        """The same input on another device."""
        return replace(self, input_ids=self.input_ids.to(device))


@dataclass(frozen=True)
class StateRequest:
    """Layers to keep, the response rows to keep of them, and what to make of these at once."""

    layers: tuple[int, ...]
    mask: Bool[Tensor, "B T"]
    final_norm: bool = True
    transform: Callable[[int, Tensor], Tensor] | None = None


class StateReader(nn.Module):
    """`read_states` of one frozen model as the forward of a module, which FSDP2 takes for its root."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(
        self, model_input: ModelInput, requests: Sequence[StateRequest], padding_free: bool | None = None
    ) -> list[dict[int, Tensor]]:
        """`read_states`."""
        return read_states(self.model, model_input, requests, padding_free)


def read_states(
    model: nn.Module,
    model_input: ModelInput,
    requests: Sequence[StateRequest],
    padding_free: bool | None = None,
    *,
    backward_follows: bool = False,
) -> list[dict[int, Tensor]]:
    """Run the backbone once, no deeper than needed and without its LM head.

    Returns, for every request, `{layer: [N, D]}`, transformed, with N the rows of its mask, row-major. With
    `padding_free` all rollouts are read as one sequence of their tokens, in which none sees another; None:
    where the model's attention takes sequences of any lengths. A model that ignores padding (`heeds_padding`)
    is run once for every length of prompt. `backward_follows` says that transforms make all losses: the
    deepest block read is then the first in the backward, and is not checkpointed.
    """
    if not padding_free and model_input.is_padded and not heeds_padding(model, model_input.input_ids.device):
        return _read_by_padding(model, model_input, requests)
    # Among equally deep requests the last one stops the forward, once the others' hooks have run.
    deepest = max(range(len(requests)), key=lambda i: (max(requests[i].layers), i))
    inputs, real = _inputs(model, model_input, padding_free)
    with ExitStack() as captures:
        if backward_follows:
            captures.enter_context(uncheckpointed(model, max(requests[deepest].layers)))
        states = []
        for i, request in enumerate(requests):
            rows = model_input.rows(request.mask)
            rows = rows if real is None else rows[real.to(rows.device)][None]
            captured = capture(
                model, request.layers, rows, request.final_norm, i == deepest, request.transform
            )
            states.append(captures.enter_context(captured))
        backbone(model)(**inputs, use_cache=False)
    return states


def _read_by_padding(
    model: nn.Module, model_input: ModelInput, requests: Sequence[StateRequest]
) -> list[dict[int, Tensor]]:
    """`read_states` without any padding in front: rollouts that had equally much of it share a forward.

    All states are kept until the last forward; only then are they transformed.
    """
    padding = (model_input.attention_mask == 0).long().cumprod(-1).sum(-1).cpu()
    groups = [(padding == width).nonzero()[:, 0] for width in padding.unique()]
    parts = []
    for group in groups:
        cut = [replace(request, mask=request.mask.cpu()[group], transform=None) for request in requests]
        parts.append(
            read_states(model, model_input.part(group, int(padding[group[0]])), cut, padding_free=False)
        )
    rollouts = torch.cat(groups)  # as they were read
    whole = []
    for number, request in enumerate(requests):
        counts = request.mask.sum(-1).cpu()[rollouts].tolist()
        states = {}
        for layer in request.layers:
            read = torch.cat([part[number][layer] for part in parts]).split(counts)
            rows = torch.cat([read[place] for place in rollouts.argsort().tolist()])
            states[layer] = rows if request.transform is None else request.transform(layer, rows)
        whole.append(states)
    return whole


def _inputs(
    model: nn.Module, model_input: ModelInput, padding_free: bool | None
) -> tuple[dict[str, Any], Bool[Tensor, "B S"] | None]:
    """What the backbone is called with, and which of the padded tokens are in it, unless all are."""
    ids, mask = model_input.input_ids, model_input.attention_mask
    # Positions count real tokens, so the amount of padding does not shift them.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    varlen = takes_lengths(model)
    if padding_free is None:
        padding_free = varlen and mixing(model) is None
    elif padding_free and (how := mixing(model)) is not None:
        raise UserError(f"padding_free: true, but {type(backbone(model)).__name__} {how}: leave it out")
    if not padding_free:
        padded = {"attention_mask": mask, "position_ids": positions}
        return {"input_ids": ids} | {name: x.to(ids.device) for name, x in padded.items()}, None
    real = mask > 0
    inputs = {
        "input_ids": ids.flatten()[real.flatten().nonzero()[:, 0].to(ids.device)][None],
        "position_ids": positions[real][None].to(ids.device),
    }
    return inputs | (_lengths(mask, ids.device) if varlen else {}), real


def _lengths(mask: Int[Tensor, "B S"], device: torch.device) -> dict[str, Any]:
    """Where sequences begin and end, as flash attention requests it: it would wait for the device to ask."""
    lengths = mask.sum(-1)
    ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
