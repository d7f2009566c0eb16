"""What we use of DeepSpeed that it puts on parameters without documenting it."""

from typing import Any

from torch import nn


def is_partitioned(weight: nn.Parameter) -> bool:
    """Whether ZeRO-3 has spread a parameter over ranks, so that it is empty between forwards.

    transformers asks in the same way; until DeepSpeed has a function that says so (tested with 0.19).
    """
    return hasattr(weight, "ds_id")


def partition(weight: nn.Parameter) -> Any:
    """This rank's part of a parameter that ZeRO-3 has spread over ranks; any other parameter itself.

    Until DeepSpeed has a function that gives it without gathering the others' (tested with 0.19).
    """
    return getattr(weight, "ds_tensor", weight)
