"""The two models of a run, as its objective is bound to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.models.teacher import Teacher


@dataclass(frozen=True)
class TrainingPair:
    """The student that is trained, its tokenizer and its teacher, and the device of the losses.

    `reference` is the model that targets are extrapolated from, where a recipe names one. `ends` are the ids
    that end a response of either, where the models differ in these.
    """

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher
    device: torch.device
    reference: Teacher | None = None
    ends: Sequence[int] = ()
