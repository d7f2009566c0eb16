"""On-policy distillation of language models in representation space (OPRD, arXiv 2606.06021)."""

import os
from typing import Any

# libgomp's threads check 300,000 times for work before they sleep, on cores that other processes need; torch
# reads this as it is loaded. docs/log.md, "How an idle thread spins", has the times.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from oprd.bridge import Bridge, BridgeFitter
from oprd.foundation.errors import UserError
from oprd.models.capture import capture
from oprd.models.loading import load_model, load_tokenizer
from oprd.objective import losses, output_space
from oprd.objective.selection import LayerMap, Positions
from oprd.text.alignment import align_tokens

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
    "load_model",
    "load_tokenizer",
    "losses",
    "output_space",
]


def __getattr__(name: str) -> Any:
    """The trainer on demand, so that the losses come without importing TRL."""
    if name in ("OPRDConfig", "OPRDTrainer"):
        from oprd.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'oprd' has no attribute {name!r}")
