"""What the teacher reads of the student's rollouts: prompts in its template, responses in its tokens."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from oprd.foundation.errors import UserError
from oprd.rollouts.generation import left_pad
from oprd.rollouts.rows import RolloutInputs
from oprd.text.alignment import AlignedResponse, Aligner, Stop, same_vocabulary
from oprd.text.messages import Prompt
from oprd.text.rendering import Renderer

logger = logging.getLogger(__name__)

FEW_PAIRS = 0.5  # share of paired rows below which the user should know


class Translation:
    """From the student's rollouts to the teacher's, with the rows of both that have read the same text.

    `template`: `student`, the teacher reads the prompt as the student does; `own`, as its own chat template
    renders it. `tokenization` counts for another vocabulary alone: `own`, template and responses are the
    teacher's; `student`, it is fed the student's ids, whatever they mean to it. `student_ends` are the ids
    that end the student's responses (`oprd.models.eos`). Raises `UserError` where a tokenizer
    lacks what this needs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
        template: str = "student",
        tokenization: str = "own",
        template_kwargs: Any = None,
        student_ends: Sequence[int] = (),
    ) -> None:
        if template == "own" and teacher_tokenizer is None:
            raise UserError("teacher_chat_template: own needs a tokenizer: name the teacher or its folder")
        other = teacher_tokenizer is not None and not same_vocabulary(tokenizer, teacher_tokenizer)
        self.feeds_foreign_ids = other and tokenization == "student"
        self.aligner: Aligner | None = None
        if teacher_tokenizer is not None and other and tokenization == "own":
            self.aligner = Aligner(tokenizer, teacher_tokenizer, student_ends)
        self.own_template = template == "own" or self.aligner is not None
        self.tokenizer: Any = teacher_tokenizer if self.own_template else tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self._is_first, self._warned, self._warned_of_collapse = True, False, False

    @property
    def is_identity(self) -> bool:
        """Whether the teacher reads exactly what the student reads."""
        return not (self.own_template or self.template_kwargs)

    def renderer(self, vocabulary: int | None = None, **template_kwargs: Any) -> Renderer:
        """How the teacher reads prompts."""
        kwargs = self.template_kwargs | template_kwargs
        return Renderer(self.tokenizer, kwargs, "the teacher", vocabulary)

    def read(
        self,
        prompts: Sequence[Prompt],
        ids: Int[Tensor, "B T"],
        mask: Int[Tensor, "B T"],
        room: Callable[[Int[Tensor, "B P"]], Sequence[int] | None] = lambda _: None,
        **template_kwargs: Any,
    ) -> tuple[RolloutInputs, list[AlignedResponse]]:
        """What the teacher reads of rollouts: `prompts`, and `responses` in the room that these leave.

        Nothing where it reads what the student reads. Masks are on the host, ids where the student's are.
        """
        if self.is_identity:
            return {}, []
        read = self.prompts(prompts, **template_kwargs)
        responses, aligned = self.responses(ids, mask, room(read["teacher_prompt_mask"]))
        return read | {"teacher_prompt_ids": read["teacher_prompt_ids"].to(ids.device)} | responses, aligned

    def prompts(self, prompts: Sequence[Prompt], **template_kwargs: Any) -> RolloutInputs:
        """`teacher_prompt_ids` and `teacher_prompt_mask`, left-padded."""
        ids, mask = left_pad(self.renderer(**template_kwargs)(prompts), self._pad_id)
        return {"teacher_prompt_ids": ids, "teacher_prompt_mask": mask}

    def responses(
        self, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"], room: Sequence[int] | None = None
    ) -> tuple[RolloutInputs, list[AlignedResponse]]:
        """`teacher_completion_ids`, mask, `teacher_rows`, `ends_together`; nothing if they are the student's.

        All but the ids is on the host. `teacher_rows[b, t]` is the teacher's row that has read what the
        student's row t has, −1 without one; `ends_together[b]`, whether both end with all read in common.
        Of a response that is longer in the teacher's tokens than its `room`, the rows beyond are unpaired.
        """
        if self.aligner is None:
            return {}, []
        lengths = mask.sum(-1).tolist()
        aligned = [self.aligner.align(row[:n]) for row, n in zip(ids.tolist(), lengths, strict=True)]
        if room is not None:
            aligned = [response.within(most) for response, most in zip(aligned, room, strict=True)]
        teacher_rows = torch.full(ids.shape, -1)
        for i, response in enumerate(aligned):
            if response.rows:
                student, teacher = torch.tensor(response.rows).T
                teacher_rows[i, student] = teacher
        read = [torch.tensor(response.teacher_ids, dtype=torch.long) for response in aligned]
        column = torch.zeros(1, dtype=torch.long)  # at least one, though all responses be empty
        padded = pad_sequence([*read, column], batch_first=True, padding_value=self._pad_id)[:-1]
        self._check_coverage(aligned)
        masks = pad_sequence([*map(torch.ones_like, read), column], batch_first=True)[:-1]
        return {
            "teacher_completion_ids": padded.to(ids.device),
            "teacher_completion_mask": masks,
            "teacher_rows": teacher_rows,
            "ends_together": torch.tensor([response.ends_together for response in aligned]),
        }, aligned

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def _check_coverage(self, aligned: Sequence[AlignedResponse]) -> None:
        """Refuse first rollouts of which the first rows alone are paired; warn, once, when few are."""
        rows, paired = sum(a.num_rows for a in aligned), sum(len(a.rows) for a in aligned)
        is_first, self._is_first = self._is_first, False
        if is_first and rows > len(aligned) and all(len(a.rows) < 2 for a in aligned):
            raise UserError(
                f"of {rows} rows of {len(aligned)} responses none but the first is paired: student and "
                "teacher never agree on the text (coverage 0); check the tokenizers and the rollouts"
            )
        if paired < FEW_PAIRS * rows and not self._warned:
            self._warned = True
            logger.warning(
                "only %.0f%% of the student's rows are paired with the teacher's: the tokenizers cut "
                "the text very differently, or the student writes invalid UTF-8",
                100 * paired / rows,
            )
        self._tell_collapse([a.stop for a in aligned if a.collapsed and a.stop], len(aligned))

    def _tell_collapse(self, stops: Sequence[Stop], num_rollouts: int) -> None:
        """Say, once, that pairing stopped within rollouts, and show where the first did."""
        if not stops or self._warned_of_collapse:
            return
        self._warned_of_collapse, first = True, stops[0]
        reason = (
            "the student's next bytes are no valid UTF-8"
            if first.invalid_utf8
            else f"the student writes {first.student!r}, the teacher's tokenizer reads {first.teacher!r}"
        )
        logger.warning(
            "in %d of %d rollouts pairing stops well before the end; in the first of them %d rows come after "
            "%r and are unpaired: %s",
            len(stops),
            num_rollouts,
            first.rows,
            first.before,
            reason,
        )
