"""The prompts that a run can use: each of them is rendered before the first rollout."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from jaxtyping import Int
from tqdm.auto import tqdm

from oprd.foundation.errors import UserError
from oprd.foundation.ranks import Ranks
from oprd.rollouts.prompts import prompt_dataset
from oprd.text.messages import Prompt, checked_prompt, excerpt
from oprd.text.rendering import Refusal, Renderer

logger = logging.getLogger(__name__)

ALONE = Ranks(0, 1)
AT_ONCE = 1000  # prompts rendered by one call
BAR_DELAY = 2  # seconds of rendering before a progress bar appears
MALFORMED = -1  # stands for a distinct prompt's index


@dataclass(frozen=True)
class UsablePrompts:
    """The rows that a run draws from, and the tokens of each prompt for each reader."""

    dataset: Dataset
    lengths: Int[np.ndarray, "readers rows"]


def usable_prompts(
    dataset: Dataset,
    readers: Sequence[Renderer],
    max_prompt_length: int | None = None,
    needed: int = 1,
    drop_unrenderable: bool = False,
    ranks: Ranks = ALONE,
) -> UsablePrompts:
    """The rows whose prompts all `readers`, the student first, can read; equal prompts are rendered once.

    Prompts of more than `max_prompt_length` tokens of the student are dropped, never cut, and counted;
    with `drop_unrenderable` so are prompts that are malformed or that a template refuses. All `ranks` have
    to call this, and each renders its share. Raises `UserError` for the first such row otherwise, and for
    fewer than `needed` rows, which is what a step takes.
    """
    if dataset.format["type"] not in (None, "custom"):  # which makes arrays of messages
        dataset = dataset.with_format(None)
    _check_columns(dataset)
    prompts = dataset if dataset.format["type"] else dataset.select_columns(["prompt"])
    distinct = _Distinct.of(prompts, drop_unrenderable)
    lengths, refused = _rendered(prompts, distinct.firsts, readers, drop_unrenderable, ranks)
    readable = ~np.isin(distinct.which, [MALFORMED, *refused])
    if not readable.all():
        rows = {distinct.firsts[i]: reason for i, reason in refused.items()}
        said = distinct.malformed | {row: _place(prompts, row) + reason for row, reason in rows.items()}
        first = said[min(said)]
        if not drop_unrenderable:
            raise UserError(f"{first}; fix or remove the row, or set drop_unrenderable_prompts: true")
        logger.warning("dropped %d of %d prompts, the first: %s", (~readable).sum(), len(dataset), first)
    kept = np.flatnonzero(readable)
    kept = kept[_not_too_long(lengths[0, distinct.which[kept]], max_prompt_length)]
    if len(kept) < needed:
        raise UserError(
            f"a step takes {needed} prompts, and the dataset has {len(kept)}: make the batch smaller"
        )
    whole = len(kept) == len(dataset)
    return UsablePrompts(dataset if whole else dataset.select(kept), lengths[:, distinct.which[kept]])


def look_ahead(stream: IterableDataset, count: int) -> Dataset:
    """The first `count` prompts of a stream, in memory.

    Raises `UserError` without a column `prompt`, and for prompts that are not all text or all messages.
    """
    rows = list(islice(stream, count))
    if rows and "prompt" not in rows[0]:
        raise UserError(f"the stream has no column 'prompt'; it has {', '.join(rows[0])}")
    prompts = [row.get("prompt") for row in rows]
    kinds = {type(prompt).__name__ for prompt in prompts if prompt is not None}
    if len(kinds) > 1 or not kinds <= {"str", "list"}:
        found = " and ".join(sorted(kinds))
        raise UserError(f"the stream's prompts are {found}: give text, or lists of messages, in all rows")
    logger.info("the stream's first %d prompts are held in memory: a run takes no more", len(prompts))
    return prompt_dataset({"prompt": prompts}, "the stream")


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


def settle_steps(settings: Any, num_prompts: int, num_processes: int) -> None:
    """Set `max_steps` to ⌈num_train_epochs × steps of a pass over the prompts⌉, unless it is set already.

    A pass leaves out the prompts that fill no step.
    """
    if settings.max_steps < 0:
        steps_per_epoch = num_prompts // prompts_per_step(settings, num_processes)
        settings.max_steps = math.ceil(settings.num_train_epochs * steps_per_epoch)


def stream_length(settings: Any, num_processes: int) -> int:
    """How many prompts of a stream a run can take; raises `UserError` without a number of steps."""
    if settings.max_steps < 1:
        raise UserError("a stream has no length: set max_steps, which says how many of its prompts to take")
    return settings.max_steps * prompts_per_step(settings, num_processes)


def _check_columns(dataset: Dataset) -> None:
    columns = list(dataset[0]) if len(dataset) else dataset.column_names
    if "prompt" not in columns:
        raise UserError(f"the dataset has no column 'prompt'; it has {', '.join(columns)}")
    for column in {"image", "images"} & set(columns):
        raise UserError(f"the dataset has a column {column!r}, and oprd distils text-only models: remove it")
    if not len(dataset):
        raise UserError("the dataset is empty: there is no prompt to roll out")


@dataclass(frozen=True)
class _Distinct:
    """Equal prompts taken together: what every row has, where each first stands, and malformed rows."""

    which: Int[np.ndarray, " rows"]
    firsts: list[int]
    malformed: dict[int, str]

    @classmethod
    def of(cls, prompts: Dataset, keeps_malformed: bool) -> "_Distinct":
        seen: dict[bytes, int] = {}
        firsts: list[int] = []
        malformed: dict[int, str] = {}
        which = np.full(len(prompts), MALFORMED)
        kind = None
        for start in range(0, len(prompts), AT_ONCE):
            for row, value in enumerate(prompts[start : start + AT_ONCE]["prompt"], start):
                try:
                    prompt = checked_prompt(value, f"row {row}")
                except UserError as error:
                    if not keeps_malformed:
                        raise
                    malformed[row] = str(error)
                    continue
                if type(prompt) is not (kind := kind or type(prompt)):
                    raise UserError(f"row {row}: text and chat prompts are mixed: use one kind")
                which[row] = seen.setdefault(_digest(prompt), len(firsts))
                if which[row] == len(firsts):
                    firsts.append(row)
        return cls(which, firsts, malformed)


def _rendered(
    prompts: Dataset, firsts: Sequence[int], readers: Sequence[Renderer], all_of_them: bool, ranks: Ranks
) -> tuple[Int[np.ndarray, "readers distinct"], dict[int, str]]:
    """Tokens of every distinct prompt for every reader, and why some cannot be read, by their index.

    Unless `all_of_them` are asked for, the first refusal ends it.
    """
    lengths = np.zeros((len(readers), len(firsts)), dtype=int)
    refused: dict[int, str] = {}
    mine = range(ranks.index, len(firsts), ranks.count)
    with tqdm(
        total=len(mine),
        desc="prompts",
        unit="prompt",
        delay=BAR_DELAY,
        leave=False,
        disable=not ranks.is_first,
    ) as bar:
        for start in range(0, len(mine), AT_ONCE):
            share = mine[start : start + AT_ONCE]
            values = prompts[[firsts[i] for i in share]]["prompt"]
            for reader, row in zip(readers, lengths, strict=True):
                for i, read in zip(share, reader.attempt(values), strict=True):
                    if isinstance(read, Refusal):
                        refused.setdefault(i, read.reason)
                    else:
                        row[i] = len(read)
            if refused and not all_of_them:
                break
            bar.update(len(share))
    everyone = ranks.gather((lengths, refused))
    return sum(part for part, _ in everyone), {i: why for _, part in everyone for i, why in part.items()}


def _place(prompts: Dataset, row: int) -> str:
    return f"row {row} ({excerpt(prompts[row]['prompt'])}): "


def _digest(prompt: Prompt) -> bytes:
    return blake2b(json.dumps(prompt, sort_keys=True, default=str).encode(), digest_size=16).digest()


def _not_too_long(lengths: Int[np.ndarray, " rows"], most: int | None) -> np.ndarray:
    """Which prompts are within the limit; logs how many are not, and raises `UserError` if none is."""
    keeps = np.ones(len(lengths), dtype=bool) if most is None else lengths <= most
    dropped = (~keeps).sum()
    if dropped and not keeps.any():
        raise UserError(
            f"All {len(lengths)} prompts are longer than max_prompt_length={most} tokens "
            f"(the shortest has {min(lengths)}): raise max_prompt_length."
        )
    if dropped:
        logger.warning("dropped %d of %d prompts of more than %d tokens", dropped, len(lengths), most)
    return keeps
