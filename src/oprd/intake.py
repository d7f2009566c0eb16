"""The prompts that a run can use: rendered once, not too long, enough of them."""

import logging
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from oprd.errors import UserError
from oprd.prompts import Prompt, drop_long_prompts

logger = logging.getLogger(__name__)


def usable_prompts(
    dataset: Dataset,
    render: Callable[[Prompt], list[int]],
    max_prompt_length: int | None,
    needed: int = 1,
) -> Dataset:
    """The rows whose prompts keep to the limit; longer ones are dropped, with a warning.

    Raises `UserError` for a dataset without prompts, a prompt that cannot be rendered, or fewer than
    `needed` rows, which is what a step takes.
    """
    if "prompt" not in dataset.column_names:
        raise UserError(f"the dataset has no column 'prompt'; it has {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise UserError("the dataset is empty: there is no prompt to roll out")
    render(dataset[0]["prompt"])
    kept, dropped = drop_long_prompts(dataset, render, max_prompt_length)
    if dropped:
        total = len(dataset)
        logger.warning("dropped %d of %d prompts of more than %d tokens", dropped, total, max_prompt_length)
    if len(kept) < needed:
        raise UserError(
            f"a step takes {needed} prompts, and the dataset has {len(kept)}: make the batch smaller"
        )
    return kept


def prompts_per_step(settings: Any, num_processes: int) -> int:
    """How many prompts a step takes on all ranks; raises `UserError` unless that is a whole number."""
    micro_batch, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    completions = micro_batch * accumulation * num_processes
    if completions % settings.num_generations:
        raise UserError(
            f"a step has {completions} completions (per_device_train_batch_size × "
            "gradient_accumulation_steps × processes), which num_generations="
            f"{settings.num_generations} does not divide: change one of them"
        )
    return completions // settings.num_generations
