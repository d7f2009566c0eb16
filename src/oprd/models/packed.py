"""Does a model keep rollouts apart that it reads as one sequence? It has to, or one would see another."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from oprd.foundation.foreign.transformers import attention_of, hands_on_lengths, is_recurrent, with_attention
from oprd.models.capture import backbone, blocks

FIRST, SECOND = 5, 3  # tokens of the two sequences that are tried

_found: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def takes_lengths(model: nn.Module) -> bool:
    """Whether a model's attention is told where sequences begin and end, as flash attention is."""
    return "flash" in str(attention_of(backbone(model).config))


def mixing(model: nn.Module) -> str | None:
    """How a model mixes rollouts that it reads as one sequence, in words; None if it keeps them apart.

    Its attention has to know where they begin: by their lengths, or by positions that begin anew. The answer
    needs no weights, so it is the same on every rank, and in a plan.
    """
    stack = backbone(model)
    if stack not in _found:
        _found[stack] = _mixing(stack)
    return _found[stack]


def _mixing(stack: Any) -> str | None:
    if not _is_attention_alone(stack):
        return "carries states from one rollout to the next"
    if takes_lengths(stack):
        is_told = hands_on_lengths(stack)
    else:
        with ThreadPoolExecutor(1) as thread:  # where no mode of a plan, of autocast or of a device is on
            is_told = thread.submit(_masks_by_position, stack).result()
    return None if is_told else "lets one rollout see another"


def _is_attention_alone(stack: Any) -> bool:
    """Whether all layers separate sequences by their positions: recurrent and convolutional ones do not."""
    kinds = getattr(stack.config, "layer_types", None) or ()
    return not is_recurrent(stack) and all("attention" in k and "linear" not in k for k in kinds)


def _masks_by_position(stack: Any) -> bool:
    """Whether each block is given a mask that keeps two sequences apart, tried on a stack without weights.

    Blocks return states, or states and something else: both are tried. A stack that fails is not trusted.
    """
    states = torch.zeros(1, FIRST + SECOND, stack.config.get_text_config().hidden_size)
    tries = (_given_to_blocks(stack, states, returned) for returned in (states, (states, None)))
    return any(bool(blocks) and all(any(map(_separates, given)) for given in blocks) for blocks in tries)


def _given_to_blocks(stack: Any, states: Tensor, returned: Any) -> list[list[Any]]:
    """What each block is called with for two sequences read as one; nothing where the stack cannot be made.

    They are of a new stack on the meta device, whose modules compute nothing: its own forward is what is
    tried. Blocks return `returned`, and other modules `states`.
    """
    given: list[list[Any]] = []
    kind: Any = next(kind for kind in type(stack).__mro__ if not issubclass(kind, FSDPModule))
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]
    with suppress(Exception), torch.no_grad():
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            bare: Any = kind(with_attention(stack.config, "eager"))  # whose mask is a tensor
        for module in bare.modules():
            if module is not bare:
                module.forward = lambda *_, **__: states
        for name, value in [*vars(bare).items(), *bare.named_buffers(recurse=False)]:
            if isinstance(value, Tensor):
                setattr(bare, name, torch.zeros_like(value, device="cpu"))
        given += [[] for _ in blocks(bare)]
        for block, values in zip(blocks(bare), given, strict=True):
            block.forward = _keeping(values, returned)
        bare(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
    return given


def _keeping(values: list[Any], returned: Any) -> Callable[..., Any]:
    """A function that puts its arguments into `values`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        values.extend((*args, *kwargs.values()))
        return returned

    return forward


def _separates(value: Any) -> bool:
    """Whether a value is a mask [B, H, S, S] by which the second sequence sees itself and not the first."""
    if not isinstance(value, Tensor) or value.shape[-2:] != (FIRST + SECOND, FIRST + SECOND):
        return False
    seen = value if value.dtype == torch.bool else value == 0
    own = seen[..., FIRST:, FIRST:].diagonal(dim1=-2, dim2=-1)
    return bool(own.all()) and not bool(seen[..., FIRST:, :FIRST].any())
