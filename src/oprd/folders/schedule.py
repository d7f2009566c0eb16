"""The learning rates of a run: tried before it starts, and followed when it is resumed to another length."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from oprd.foundation.errors import UserError
from oprd.foundation.foreign.torch import note_rates

OF_THE_MODEL = {"params", "model", "optimizer_dict"}  # options of optimisers that take no other weights


def check_optimizer(args: TrainingArguments, kind: Any, options: dict[str, Any]) -> None:
    """Make the optimiser and the schedule of a run on one weight; what they refuse is a `UserError`."""
    weight = nn.Parameter(torch.zeros(1, 1))
    optimizer = torch.optim.SGD([weight], lr=args.learning_rate)
    try:
        if not options.keys() & OF_THE_MODEL:
            optimizer = kind([weight], **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"optim: {OptimizerNames(args.optim).value}: {error}") from error
    kwargs = args.lr_scheduler_kwargs
    assert not isinstance(kwargs, str)  # which it is until the arguments have read it
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(args.max_steps),
            num_training_steps=args.max_steps,
            scheduler_specific_kwargs=kwargs,
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"lr_scheduler_type: {SchedulerType(args.lr_scheduler_type).value}: {error}"
        ) from error


def follow_schedule(scheduler: Any) -> None:
    """Set the learning rates of the step that comes next to what the schedule says of it.

    The optimiser of a checkpoint still has those that the schedule of that run said, which was of another
    length if `max_steps` has changed since. Schedules that follow from a loss keep theirs.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)  # as accelerate wraps it
    if not isinstance(schedule, LambdaLR):
        return
    rates = [
        base * share(schedule.last_epoch)
        for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    note_rates(schedule, rates)
