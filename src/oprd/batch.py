"""From TRL's padded rollouts to what an update reads: which rows are supervised and how much each weighs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from oprd.objective import num_units, row_weights
from oprd.reading import Reading
from oprd.selection import Positions
from oprd.settings import ObjectiveSettings

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of rollouts with the weight of every row (zero = not supervised)."""

    student: Reading
    teacher: Reading
    tokens: Int[Tensor, "B T"]
    representation_weights: Float[Tensor, "B T"]
    output_weights: Float[Tensor, "B T"]

    @classmethod
    def of(cls, inputs: Inputs) -> "Batch":
        """Read TRL's `prompt_*` and `completion_*`, `row_weights` and, where given, `teacher_prompt_*`."""
        completion = inputs["completion_ids"], inputs["completion_mask"]
        student = Reading.of(inputs["prompt_ids"], inputs["prompt_mask"], *completion)
        teacher = student
        if "teacher_prompt_ids" in inputs:
            teacher = Reading.of(inputs["teacher_prompt_ids"], inputs["teacher_prompt_mask"], *completion)
        weights = inputs["representation_weights"], inputs["output_weights"]
        return cls(student, teacher, inputs["completion_ids"], *weights)


def truncated_rollouts(inputs: Inputs, eos_token_ids: Sequence[int]) -> Bool[Tensor, " B"]:
    """Which rollouts reached the length limit without an EOS (which the padding token may equal)."""
    last = inputs["completion_mask"].sum(-1, keepdim=True).clamp(min=1) - 1
    token = inputs["completion_ids"].gather(-1, last).squeeze(-1)
    return ~torch.isin(token, torch.tensor(list(eos_token_ids), device=token.device))


def weigh_rows(
    inputs: Inputs,
    truncated: Bool[Tensor, " B"],
    settings: ObjectiveSettings,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, Float[Tensor, "B T"]]:
    """The weight of every response row in either term, for the rollouts of a whole accumulation window.

    Padding, tool output and, if so set, truncated rollouts are not supervised: they neither weigh nor
    count for `last=k`.
    """
    supervised = inputs["completion_mask"] * inputs.get("tool_mask", 1) > 0
    if settings.mask_truncated_completions:
        supervised = supervised & ~truncated[:, None]
    weights = {}
    for term, spec in (("representation", settings.positions), ("output", settings.output_positions)):
        mask = Positions.parse(spec).mask(supervised)
        total = sum_over_ranks(num_units(mask, settings.reduction))
        weights[f"{term}_weights"] = row_weights(mask, settings.reduction, total)
    return weights


def left_pad(prompts: Sequence[list[int]], pad_id: int) -> tuple[Int[Tensor, "B P"], Int[Tensor, "B P"]]:
    """Prompts of token ids as one left-padded tensor, and its mask."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    mask = [torch.ones_like(prompt) for prompt in ids]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left"),
        pad_sequence(mask, batch_first=True, padding_side="left"),
    )
