"""The bridge between models of other depth, width or tokenizer: the frozen artifact and its exact fit."""

from oprd.bridge.artifact import Bridge
from oprd.bridge.fitter import BridgeFitter

__all__ = ["Bridge", "BridgeFitter"]
