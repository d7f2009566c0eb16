"""What we use of accelerate that it keeps private."""

from torch import nn


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate brings a module's weights, or its inputs, to where it runs.

    `has_offloaded_params` is public, and tells of offloaded weights alone: until there is one that tells of
    several devices too (tested with 1.15).
    """
    return hasattr(module, "_hf_hook")
