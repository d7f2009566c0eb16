"""Blocks under gradient checkpointing, and what they need not compute again in the backward."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from oprd.foundation.errors import UserError
from oprd.foundation.foreign.torch import ATTENTION_KERNELS
from oprd.foundation.foreign.transformers import (
    attention_of,
    checkpoint_of,
    checkpointing_restored,
    old_names_unheard,
    set_checkpoint,
)
from oprd.models.capture import backbone, blocks

# Of gradient_checkpointing_kwargs: which blocks checkpoint, and where. The other keys are torch's.
OF_BLOCKS = ("every_n_layers", "offload")


def checkpoint_blocks(model: Any, kwargs: Mapping[str, Any] | None) -> None:
    """Let the blocks of a Hugging Face model checkpoint themselves, as its trainer does it."""
    of_blocks, of_torch = _split(kwargs)
    with old_names_unheard():  # transformers before 5.23 has no others
        model.gradient_checkpointing_enable(of_torch or None, **of_blocks)


def _split(kwargs: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    of_torch = dict(kwargs or {})
    return {key: of_torch.pop(key) for key in OF_BLOCKS if key in of_torch}, of_torch


@contextmanager
def uncheckpointed(model: nn.Module, layer: int) -> Iterator[None]:
    """Let the block that writes `layer` keep its activations, where blocks checkpoint themselves.

    A backward that begins with that block would run it again at once: this saves the run, at the same peak.
    """
    block: Any = blocks(model)[max(layer - 1, 0)]
    with checkpointing_restored(block):
        if getattr(block, "gradient_checkpointing", False):
            block.gradient_checkpointing = False
        yield


@contextmanager
def attention_kept(model: nn.Module) -> Iterator[None]:
    """Let checkpointed blocks keep what attention returns: [B, S, D], and a number per row and head.

    The backward then runs their norms and products again, but not attention, whose cost grows with the
    square of the length. Gradients are those of plain checkpointing, to the bit. Blocks that can keep
    nothing are left as they are (`check_attention_kept`).
    """
    stack = backbone(model)
    with checkpointing_restored(stack):
        for module in stack.modules():
            checkpoint = checkpoint_of(module)
            if isinstance(checkpoint, partial) and checkpoint.keywords.get("use_reentrant") is False:
                set_checkpoint(module, partial(checkpoint, context_fn=_contexts))
        yield


def check_attention_kept(model: nn.Module, checkpointing: bool, kwargs: Mapping[str, Any] | None) -> None:
    """Raise `UserError` where `attention_kept` would keep nothing of a model checkpointed with `kwargs`."""
    attention = attention_of(backbone(model).config)
    _, of_torch = _split(kwargs)
    cause = None
    if not checkpointing:
        cause = "gradient_checkpointing is off, so that everything is kept"
    elif of_torch and of_torch.get("use_reentrant", True):
        cause = "without use_reentrant: false among gradient_checkpointing_kwargs blocks keep nothing"
    elif attention != "sdpa":
        cause = f"attn_implementation is {attention}, and only what sdpa returns can be kept"
    if cause is not None:
        raise UserError(f"keep_attention: true, but {cause}: leave it out")


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For one checkpointed block: what its forward runs in, and what its second run in the backward does."""
    kept: deque[AbstractContextManager] = deque()

    def keep() -> AbstractContextManager:
        first, again = create_selective_checkpoint_contexts(ATTENTION_KERNELS)
        kept.append(again)
        return first

    return _AroundAttention(keep), _AroundAttention(lambda: kept.popleft() if kept else nullcontext())


class _AroundAttention(TorchFunctionMode):
    """Calls attention inside a context, and nothing else: torch's own mode would see every operation."""

    def __init__(self, context: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self._context = context

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self._context() if _is_kept(func, *args, **kwargs) else nullcontext():
            return func(*args, **kwargs)


def _is_kept(func: Any, /, *args: Any, dropout_p: float = 0.0, **_: Any) -> bool:
    """Attention, if it draws no random numbers: what follows would draw others when it is not run again."""
    return func is scaled_dot_product_attention and not (args[4] if len(args) > 4 else dropout_p)
