"""On-policy distillation of language models in representation space (OPRD, arXiv 2606.06021)."""

import importlib
import os
from typing import TYPE_CHECKING, Any

# libgomp's threads check 300,000 times for work before they sleep, on cores that other processes need; torch
# reads this as it is loaded. docs/log.md, "How an idle thread spins", has the times.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from oprd.bridge import Bridge, BridgeFitter
from oprd.foundation.errors import UserError
from oprd.models.capture import capture
from oprd.objective import losses, output_space
from oprd.objective.selection import LayerMap, Positions
from oprd.text.alignment import align_tokens

if TYPE_CHECKING:
    from oprd.models.loading import load_model, load_tokenizer
    from oprd.rollouts.prompts import load_prompts
    from oprd.training.config import OPRDConfig
    from oprd.training.trainer import OPRDTrainer

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
    "load_prompts",
    "load_tokenizer",
    "losses",
    "output_space",
]


ON_DEMAND = {  # so that the losses come without importing TRL or datasets
    "OPRDConfig": "oprd.training.config",
    "OPRDTrainer": "oprd.training.trainer",
    "load_model": "oprd.models.loading",
    "load_prompts": "oprd.rollouts.prompts",
    "load_tokenizer": "oprd.models.loading",
}


def __getattr__(name: str) -> Any:
    """What is imported when it is first asked for."""
    if name in ON_DEMAND:
        return getattr(importlib.import_module(ON_DEMAND[name]), name)
    raise AttributeError(f"module 'oprd' has no attribute {name!r}")
