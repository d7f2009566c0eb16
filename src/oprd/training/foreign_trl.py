"""What we change of TRL while it makes a trainer, since no argument of it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl.generation import vllm_generation

from oprd.rollouts.engines.vllm import make_llm


@contextmanager
def training_engines() -> Iterator[None]:
    """Within the block, the engines that TRL makes fit this machine, and can be checked.

    TRL asks for log-probs of the distribution that was sampled from, which top-p and the like cut and
    rescale; the model's own are what a trainer has in every sampling setting. Until TRL takes any argument of
    `vllm.LLM` (tested with 1.16).
    """
    module: Any = vllm_generation

    def make(**options: Any) -> Any:
        if not torch.accelerator.is_available():
            options["dtype"] = "float32"  # half precision is packed too where a CPU has units for it
        return make_llm(**(options | {"logprobs_mode": "raw_logprobs"}))

    kept, module.LLM = module.LLM, make
    try:
        yield
    finally:
        module.LLM = kept


@contextmanager
def taken_as_loaded(settings: Any) -> Iterator[None]:
    """Within it a config names no arguments of loading: TRL would warn that a loaded student ignores them.

    Until TRL's trainer keeps still about arguments that its caller has used (tested with 1.16).
    """
    kept, settings.model_init_kwargs = settings.model_init_kwargs, None
    try:
        yield
    finally:
        settings.model_init_kwargs = kept
