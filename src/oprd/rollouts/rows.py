"""From TRL's padded rollouts to what an update reads: which rows are supervised and how much each weighs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from oprd.models.forward import ModelInput
from oprd.objective.composite import num_units, row_weights
from oprd.objective.selection import Positions
from oprd.objective.settings import ObjectiveSettings
from oprd.objective.terms import OUTPUT, REPRESENTATION, TERMS
from oprd.text.shared_tokens import SharedTokens


class RolloutInputs(TypedDict, total=False):
    """B rollouts on their way from TRL, or a bridge's fit, by translation and weights to a `RolloutBatch`.

    From `on_host` on masks are on the host, and so is what translation adds but for ids.
    """

    prompt_ids: Int[Tensor, "B P"]  # left-padded
    prompt_mask: Int[Tensor, "B P"]  # 1 at a token, 0 at padding
    completion_ids: Int[Tensor, "B T"]  # the response, right-padded
    completion_mask: Int[Tensor, "B T"]  # 1 at a token, 0 at padding
    tool_mask: Int[Tensor, "B T"]  # 0 at what a tool wrote; there with tools alone
    num_items_in_batch: Int[Tensor, ""]  # TRL's count of tokens, which nothing here reads
    engine_log_probs: Float[Tensor, "B T"]  # of the sampled tokens, as the engine that drew them has them
    teacher_prompt_ids: Int[Tensor, "B P2"]  # left-padded; without it the teacher reads the student's prompt
    teacher_prompt_mask: Int[Tensor, "B P2"]  # 1 at a token, 0 at padding
    teacher_completion_ids: Int[Tensor, "B T2"]  # the response in the teacher's own tokens, right-padded
    teacher_completion_mask: Int[Tensor, "B T2"]  # 1 at a token, 0 at padding
    teacher_rows: Int[Tensor, "B T"]  # the teacher's row that has read what this row has; -1 without one
    ends_together: Bool[Tensor, " B"]  # whether both tokenizations end with all text read in common
    representation_weights: Float[Tensor, "B T"]  # of every row in its term; 0 is not supervised
    output_weights: Float[Tensor, "B T"]  # likewise
    anchor_weights: Float[Tensor, "B T"]  # likewise


@dataclass(frozen=True)
class RolloutBatch:
    """A micro-batch of rollouts: what was sampled, what the teacher reads, and the weight of every row.

    A weight of zero is a row that is not supervised.
    """

    student: ModelInput
    teacher: ModelInput
    tokens: Int[Tensor, "B T"]
    representation_weights: Float[Tensor, "B T"]
    output_weights: Float[Tensor, "B T"]
    anchor_weights: Float[Tensor, "B T"] | None = None
    teacher_rows: Int[Tensor, "B T"] | None = None
    teacher_tokens: Int[Tensor, "B T2"] | None = None
    teacher_written: Bool[Tensor, "B T2"] | None = None
    engine_log_probs: Float[Tensor, "B T"] | None = None

    @classmethod
    def of(cls, inputs: RolloutInputs) -> "RolloutBatch":
        """Read `prompt_*`, `completion_*`, all `*_weights`; if given, `teacher_*` and `engine_log_probs`."""
        completion = inputs["completion_ids"], inputs["completion_mask"]
        student = ModelInput.of(inputs["prompt_ids"], inputs["prompt_mask"], *completion)
        teacher, read = student, None
        if "teacher_completion_ids" in inputs:
            read = inputs["teacher_completion_ids"], inputs["teacher_completion_mask"] > 0
        if "teacher_prompt_ids" in inputs:
            prompt = inputs["teacher_prompt_ids"], inputs["teacher_prompt_mask"]
            teacher = ModelInput.of(*prompt, *(read or completion))
        return cls(
            student,
            teacher,
            inputs["completion_ids"],
            inputs["representation_weights"],
            inputs["output_weights"],
            inputs.get("anchor_weights"),
            inputs.get("teacher_rows"),
            teacher_tokens=None if read is None else read[0],
            teacher_written=None if read is None else read[1],
            engine_log_probs=inputs.get("engine_log_probs"),
        )

    def rows(self, term: str) -> "SupervisedRows":
        """The rows that `term` supervises, with their weights where the student is."""
        weights = getattr(self, f"{term}_weights")
        mask = weights > 0
        return SupervisedRows(mask, weights[mask].to(self.tokens.device, non_blocking=True))

    def on_teacher(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T2"]:
        """The teacher's rows that are paired with the student's rows of `mask`, in the same order."""
        if self.teacher_rows is None:
            return mask
        placed = torch.zeros(len(mask), self.teacher.num_rows, dtype=torch.bool, device=mask.device)
        rollouts, rows = mask.nonzero(as_tuple=True)
        placed[rollouts, self.teacher_rows[rollouts, rows]] = True
        return placed

    def spans(self, mask: Bool[Tensor, "B T"]) -> "Spans":
        """The spans of text that the rows of `mask` write, none in part, and the teacher's rows of these."""
        assert self.teacher_rows is not None and self.teacher_written is not None
        ours = _spans(self.teacher_rows >= 0)
        wanted = torch.zeros_like(ours).scatter_add(1, ours, mask.long()) > 0
        starts = torch.zeros_like(self.teacher_written)
        starts[:, : self.teacher.num_rows] = self.on_teacher(self.teacher_rows >= 0)
        theirs = _spans(starts)
        written = wanted.gather(1, theirs) & self.teacher_written
        first = torch.arange(len(mask), device=mask.device)[:, None] * (mask.shape[1] + 1)
        return Spans((first + ours)[mask], (first + theirs)[written], written)


@dataclass(frozen=True)
class SupervisedRows:
    """Response rows of a micro-batch, and the weight of each, row-major."""

    mask: Bool[Tensor, "B T"]
    weights: Float[Tensor, " N"]

    @property
    def rollouts(self) -> Int[Tensor, " N"]:
        """The rollout of each row, where the weights are."""
        return self.mask.nonzero()[:, 0].to(self.weights.device)


@dataclass(frozen=True)
class Spans:
    """The numbers of the spans that rows write: consecutive within a rollout, never from one to the next."""

    student: Int[Tensor, " N"]
    teacher: Int[Tensor, " M"]
    teacher_mask: Bool[Tensor, "B T2"]


def _spans(starts: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The number of every row's span within its rollout, given where spans start."""
    return (starts.cumsum(-1) - 1).clamp(min=0)


def whole_spans(mask: Bool[Tensor, "B T"], inputs: RolloutInputs) -> Bool[Tensor, "B T"]:
    """The rows of `mask` whose span lies within it and ends where the teacher's does."""
    written = inputs["completion_mask"] > 0
    span = _spans(inputs["teacher_rows"] >= 0)
    last = span.masked_fill(~written, -1).amax(-1, keepdim=True)
    open_ended = (span == last) & ~inputs["ends_together"][:, None]
    missing = torch.zeros_like(span).scatter_add(1, span, (written & ~mask).long()).gather(1, span)
    return mask & (missing == 0) & ~open_ended


def rows_of_shared_tokens(
    mask: Bool[Tensor, "B T"], inputs: RolloutInputs, shared: SharedTokens
) -> Bool[Tensor, "B T"]:
    """The rows of `mask` at which both models have read the same and one token of both comes next."""
    rows, device = inputs["teacher_rows"], mask.device
    theirs = inputs["teacher_completion_ids"].to(device).gather(1, rows.clamp(min=0))
    return mask & (rows >= 0) & shared.next_tokens_agree(inputs["completion_ids"].to(device), theirs)


def each(inputs: RolloutInputs, change: Callable[[str, Tensor], Tensor]) -> RolloutInputs:
    """`change(name, tensor)` of all tensors."""
    tensors = cast(dict[str, Tensor], inputs)
    return cast(RolloutInputs, {name: change(name, value) for name, value in tensors.items()})


def on_host(inputs: RolloutInputs) -> RolloutInputs:
    """`inputs` with the masks on the host, where rows are chosen: an update then never waits for a device."""
    return each(inputs, lambda name, value: value.cpu() if name.endswith("_mask") else value)


def truncated_rollouts(inputs: RolloutInputs, eos_token_ids: Sequence[int]) -> Bool[Tensor, " B"]:
    """Which rollouts reached the length limit without an EOS (which the padding token may equal)."""
    last = inputs["completion_mask"].sum(-1, keepdim=True).clamp(min=1) - 1
    token = inputs["completion_ids"].gather(-1, last.to(inputs["completion_ids"].device)).squeeze(-1)
    return ~torch.isin(token, torch.tensor(list(eos_token_ids), device=token.device)).to(last.device)


def readable(ids: Int[Tensor, "B T"], vocabulary: int | None) -> Bool[Tensor, "B T"]:
    """The tokens before the first that lies beyond `vocabulary`, as a padded embedding may have."""
    return (ids < (vocabulary or math.inf)).long().cumprod(-1).bool()


def weigh_rows(
    inputs: RolloutInputs,
    truncated: Bool[Tensor, " B"],
    settings: ObjectiveSettings,
    sum_over_ranks: Callable[[Tensor], Tensor],
    vocabulary: int | None = None,
    shared: SharedTokens | None = None,
) -> RolloutInputs:
    """The weight of every response row in each term, for the rollouts of a whole accumulation window.

    Padding, tool output, what comes after an id beyond the shared `vocabulary` (None: of no concern) and, if
    so set, truncated rollouts are not supervised, nor are unpaired rows in the representation term: they have
    weight zero and do not count for `last=k`. Across tokenizers the output term takes only rows before a
    token that both have or, without `shared`, complete spans of text.
    """
    supervised = inputs["completion_mask"] * inputs.get("tool_mask", 1) > 0
    supervised &= readable(inputs["completion_ids"].to(supervised.device), vocabulary)
    if settings.mask_truncated_completions:
        supervised = supervised & ~truncated[:, None]
    paired = {REPRESENTATION: inputs["teacher_rows"] >= 0} if "teacher_rows" in inputs else {}
    weights = {}
    for term, spec in zip(TERMS, (settings.positions, settings.output_positions, "all"), strict=True):
        mask = Positions.parse(spec).mask(supervised & paired.get(term, True))
        if term == OUTPUT and "teacher_rows" in inputs:
            mask = rows_of_shared_tokens(mask, inputs, shared) if shared else whole_spans(mask, inputs)
        total = sum_over_ranks(num_units(mask, settings.reduction))
        weights[f"{term}_weights"] = row_weights(mask, settings.reduction, total)
    return cast(RolloutInputs, weights)
