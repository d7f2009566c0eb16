"""From TRL's padded rollouts to what an update reads: which rows are supervised and how much each weighs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from oprd.objective import num_units, row_weights
from oprd.reading import Reading
from oprd.selection import Positions
from oprd.settings import ObjectiveSettings

Inputs = dict[str, Any]

TERMS = ("representation", "output", "anchor")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of rollouts with the weight of every row (zero = not supervised)."""

    student: Reading
    teacher: Reading
    tokens: Int[Tensor, "B T"]
    representation_weights: Float[Tensor, "B T"]
    output_weights: Float[Tensor, "B T"]
    anchor_weights: Float[Tensor, "B T"] | None = None
    teacher_rows: Int[Tensor, "B T"] | None = None

    @classmethod
    def of(cls, inputs: Inputs) -> "Batch":
        """Read TRL's `prompt_*` and `completion_*`, all `*_weights` and, where given, `teacher_*`."""
        completion = inputs["completion_ids"], inputs["completion_mask"]
        student = Reading.of(inputs["prompt_ids"], inputs["prompt_mask"], *completion)
        teacher = student
        if "teacher_prompt_ids" in inputs:
            read = completion
            if "teacher_completion_ids" in inputs:
                read = inputs["teacher_completion_ids"], inputs["teacher_completion_mask"]
            teacher = Reading.of(inputs["teacher_prompt_ids"], inputs["teacher_prompt_mask"], *read)
        return cls(
            student,
            teacher,
            inputs["completion_ids"],
            inputs["representation_weights"],
            inputs["output_weights"],
            inputs.get("anchor_weights"),
            inputs.get("teacher_rows"),
        )

    def on_teacher(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T2"]:
        """The teacher's rows that have read what the student's rows of `mask` have; as many, in one order."""
        if self.teacher_rows is None:
            return mask
        placed = torch.zeros(len(mask), self.teacher.num_rows, dtype=torch.bool, device=mask.device)
        rollouts, rows = mask.nonzero(as_tuple=True)
        placed[rollouts, self.teacher_rows[rollouts, rows]] = True
        return placed


def truncated_rollouts(inputs: Inputs, eos_token_ids: Sequence[int]) -> Bool[Tensor, " B"]:
    """Which rollouts reached the length limit without an EOS (which the padding token may equal)."""
    last = inputs["completion_mask"].sum(-1, keepdim=True).clamp(min=1) - 1
    token = inputs["completion_ids"].gather(-1, last).squeeze(-1)
    return ~torch.isin(token, torch.tensor(list(eos_token_ids), device=token.device))


def readable(ids: Int[Tensor, "B T"], vocabulary: int | None) -> Bool[Tensor, "B T"]:
    """The tokens before the first that lies beyond `vocabulary`, as a padded embedding may have."""
    return (ids < (vocabulary or math.inf)).long().cumprod(-1).bool()


def weigh_rows(
    inputs: Inputs,
    truncated: Bool[Tensor, " B"],
    settings: ObjectiveSettings,
    sum_over_ranks: Callable[[Tensor], Tensor],
    vocabulary: int | None = None,
) -> dict[str, Float[Tensor, "B T"]]:
    """The weight of every response row in each term, for the rollouts of a whole accumulation window.

    Padding, tool output, what comes after an id beyond the shared `vocabulary` (None: of no concern) and, if
    so set, truncated rollouts are not supervised, nor is in the representation term a row without a partner
    among the teacher's: they neither weigh nor count for `last=k`.
    """
    supervised = inputs["completion_mask"] * inputs.get("tool_mask", 1) > 0
    supervised &= readable(inputs["completion_ids"], vocabulary)
    if settings.mask_truncated_completions:
        supervised = supervised & ~truncated[:, None]
    paired = {"representation": inputs["teacher_rows"] >= 0} if "teacher_rows" in inputs else {}
    weights = {}
    for term, spec in zip(TERMS, (settings.positions, settings.output_positions, "all"), strict=True):
        mask = Positions.parse(spec).mask(supervised & paired.get(term, True))
        total = sum_over_ranks(num_units(mask, settings.reduction))
        weights[f"{term}_weights"] = row_weights(mask, settings.reduction, total)
    return weights
