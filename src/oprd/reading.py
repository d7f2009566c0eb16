"""One forward of a backbone over rollouts: what it reads, and which rows of which layers are kept.

Row t, 0-based, is the state that predicts response token t: the last prompt token for t = 0. The
last response token is read by no row, so it is not fed.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from oprd.capture import backbone, capture


@dataclass(frozen=True)
class Reading:
    """Token ids that a model reads and where the response rows lie among them."""

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
    ) -> "Reading":
        """Left-padded prompts and right-padded completions, less the columns that are padding throughout.

        With masks on the host, ids on an accelerator are not waited for.
        """
        skipped = prompt_ids.shape[1] - max(prompt_mask.sum(-1).tolist())
        longest = max(*completion_mask.sum(-1).tolist(), 1)
        ids = torch.cat([prompt_ids[:, skipped:], completion_ids[:, : longest - 1]], dim=1)
        mask = torch.cat([prompt_mask[:, skipped:], completion_mask[:, : longest - 1]], dim=1)
        mask = mask.to(ids.device, non_blocking=True)
        return cls(ids, mask, prompt_ids.shape[1] - skipped - 1, longest)

    def rows(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B S"]:
        """A mask over response rows as a mask over the sequence."""
        placed = torch.zeros(self.input_ids.shape, dtype=torch.bool, device=mask.device)
        placed[:, self.first_row : self.first_row + self.num_rows] = mask[:, : self.num_rows]
        return placed

    def to(self, device: torch.device) -> "Reading":
        """The same reading on another device."""
        return Reading(
            self.input_ids.to(device), self.attention_mask.to(device), self.first_row, self.num_rows
        )


@dataclass(frozen=True)
class Want:
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

    def forward(self, reading: Reading, wants: Sequence[Want]) -> list[dict[int, Tensor]]:
        """`read_states`."""
        return read_states(self.model, reading, wants)


def read_states(model: nn.Module, reading: Reading, wants: Sequence[Want]) -> list[dict[int, Tensor]]:
    """Run the backbone once, no deeper than needed and without its LM head.

    Returns, for every want, `{layer: [N, D]}`, transformed, with N the rows of its mask, row-major.
    """
    # Among equally deep wants the last one stops the forward, once the others' hooks have run.
    deepest = max(range(len(wants)), key=lambda i: (max(wants[i].layers), i))
    # Positions count real tokens, so the amount of padding does not shift them.
    positions = (reading.attention_mask.cumsum(-1) - 1).clamp(min=0)
    with ExitStack() as captures:
        states = [
            captures.enter_context(
                capture(
                    model, want.layers, reading.rows(want.mask), want.final_norm, i == deepest, want.transform
                )
            )
            for i, want in enumerate(wants)
        ]
        backbone(model)(
            input_ids=reading.input_ids,
            attention_mask=reading.attention_mask,
            position_ids=positions,
            use_cache=False,
        )
    return states
