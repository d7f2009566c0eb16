"""The bridge between models of other depth, width or tokenizer: its fit (Eq. 12-13) and the frozen artifact.

Imports `folders`, `rollouts` and what they may import.
"""

from oprd.bridge.artifact import Bridge
from oprd.bridge.fitter import BridgeFitter

__all__ = ["Bridge", "BridgeFitter"]
