"""On-policy distillation of language models in representation space (OPRD, arXiv 2606.06021)."""

import os
from typing import Any

# OpenMP's threads would wait for work in a loop, on cores that other processes need. Read as torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from oprd import losses, output_space
from oprd.alignment import align_tokens
from oprd.bridge import Bridge, BridgeFitter
from oprd.capture import capture
from oprd.errors import UserError
from oprd.selection import LayerMap, Positions

__version__ = "0.1.0"
__all__ = [
    "Bridge",
    "BridgeFitter",
    "LayerMap",
    "OPRDConfig",
    "OPRDTrainer",
    "Positions",
    "UserError",
    "align_tokens",
    "capture",
    "losses",
    "output_space",
]


def __getattr__(name: str) -> Any:
    """The trainer on demand, so that the losses come without importing TRL."""
    if name in ("OPRDConfig", "OPRDTrainer"):
        from oprd import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'oprd' has no attribute {name!r}")
