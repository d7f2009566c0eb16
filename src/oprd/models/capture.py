"""Hidden states of chosen layers by forward hooks, with the wanted rows picked at the hook.

Layer 0 is the embedding output, l = 1..L the blocks, as in Hugging Face's `hidden_states[l]`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from oprd.foundation.errors import UserError
from oprd.foundation.foreign.transformers import checkpoint_of, set_checkpoint


class _StopForward(Exception):
    """Ends a forward whose deepest wanted layer has been captured."""


def backbone(model: nn.Module) -> Any:
    """The stack of blocks and its final norm, below any LM head, adapter or distributed wrapper."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    stacks = [inner.get_decoder()] if hasattr(inner, "get_decoder") else []
    # Some name their LM head decoder (ModernBERT), or nothing (Llama 4).
    stacks += [stack for name in ("base_model", "model") if (stack := getattr(inner, name, None)) is not None]
    return next((stack for stack in stacks if _module_lists(stack)), (stacks or [inner])[0])


def blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a causal language model, in order; raises `UserError` where they cannot be found."""
    stack = backbone(model)
    depth = stack.config.get_text_config().num_hidden_layers
    lists = [layers for layers in _module_lists(stack) if len(layers) == depth]
    if len(lists) != 1:
        raise UserError(
            f"cannot find the {depth} blocks of {type(stack).__name__}: it has {len(lists)} module lists of "
            "that length; use a decoder-only causal language model"
        )
    return lists[0]


def _module_lists(stack: nn.Module) -> list[nn.ModuleList]:
    return [child for child in stack.children() if isinstance(child, nn.ModuleList)]


def num_layers(model: nn.Module) -> int:
    """Depth L of a causal language model."""
    return len(blocks(model))


@contextmanager
def capture(
    model: nn.Module,
    layers: Sequence[int],
    rows: Bool[Tensor, "B S"] | None = None,
    final_norm: bool = True,
    stop_early: bool = False,
    transform: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Collect the hidden states of `layers` during the one forward that the `with` block runs.

    Yields a dict that the forward fills: `{layer: [B, S, D]}`, or `[N, D]` row-major with `rows`, a
    mask over the whole sequence. States keep the model's dtype and the autograd graph. Layer L is
    taken after the final norm, or before it with `final_norm=False`. With `stop_early` the forward
    ends once the deepest layer is there: no later block and no LM head runs, and the rest of the
    `with` block is skipped, so make the forward its last statement. `transform(layer, states)` is applied
    at the hook, and only its result is kept.

    Works with gradient checkpointing (reentrant or not), adapters and distributed wrappers. Raises
    `UserError` for a layer outside 0..L or for `rows` of another shape than the forward's input, and
    `RuntimeError` unless every layer fired exactly once.
    """
    stack, sequence = backbone(model), blocks(model)
    _check_layers(layers, len(sequence))
    store = _Store(rows, transform)
    deepest = max(layers, default=0)
    with ExitStack() as hooks:
        for layer in layers:
            if layer == len(sequence) and final_norm:
                hooks.callback(stack.register_forward_hook(store.on_output(layer)).remove)
            elif (replayer := _replayer(block := sequence[max(layer - 1, 0)], stack)) is not None:
                hooks.enter_context(_around_checkpoint(replayer, block, layer, store))
            elif layer == 0:
                hooks.callback(block.register_forward_pre_hook(store.on_input, with_kwargs=True).remove)
            else:
                hooks.callback(block.register_forward_hook(store.on_output(layer)).remove)
        if stop_early:
            # Before block l + 1, and ahead of any other hook there, so that nothing of it is begun.
            stop = (
                sequence[deepest].register_forward_pre_hook(_stop, prepend=deepest > 0)
                if deepest < len(sequence)
                else stack.register_forward_hook(_stop)
            )
            hooks.callback(stop.remove)
        with suppress(_StopForward):
            yield store.states
        store.finish(layers)


class _Store:
    """The states of one forward and the row selection they share."""

    def __init__(self, rows: Tensor | None, transform: Callable[[int, Tensor], Tensor] | None) -> None:
        self.states: dict[int, Tensor] = {}
        self._rows, self._transform = rows, transform
        self._indices: dict[torch.device, Tensor] = {}

    def on_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.keep(0, args[0] if args else kwargs["hidden_states"])

    def on_output(self, layer: int) -> Callable[[nn.Module, tuple, object], None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            self.keep(layer, _tensor(output))

        return hook

    def finish(self, layers: Sequence[int]) -> None:
        if missing := [layer for layer in layers if layer not in self.states]:
            raise RuntimeError(f"layers {missing} did not run: run one forward inside the capture")

    def keep(self, layer: int, whole: Tensor) -> None:
        if layer in self.states:
            raise RuntimeError(f"layer {layer} ran twice: run one forward inside each capture")
        picked = self._pick(whole)
        self.states[layer] = picked if self._transform is None else self._transform(layer, picked)

    def _pick(self, whole: Tensor) -> Tensor:
        if self._rows is None:
            return whole
        if self._rows.shape != whole.shape[:2]:
            raise UserError(
                f"rows has shape {tuple(self._rows.shape)}, but the forward read sequences of shape "
                f"{tuple(whole.shape[:2])}: rows is a mask over the whole sequence, prompt included"
            )
        if whole.device not in self._indices:
            self._indices[whole.device] = self._rows.flatten().nonzero().squeeze(1).to(whole.device)
        return whole.flatten(0, 1).index_select(0, self._indices[whole.device])


def _replayer(block: Any, stack: Any) -> Any | None:
    """What runs a block again in the backward, hooks included: the block, its stack, or nothing.

    Blocks of transformers 5.19 checkpoint their `__call__`, those of 5.23 their `forward` alone; models of an
    older style have their stack do it.
    """
    owner = block if hasattr(block, "gradient_checkpointing") else stack
    if not (getattr(owner, "gradient_checkpointing", False) and owner.training):
        return None
    if owner is block and type(block).__call__ is nn.Module.__call__:
        return None
    if checkpoint_of(owner) is None:
        raise UserError(
            f"{type(owner).__name__} checkpoints its blocks in a way of its own, so their states cannot be "
            "captured: switch it on with gradient_checkpointing_enable, or off"
        )
    return owner


@contextmanager
def _around_checkpoint(replayer: Any, block: Any, layer: int, store: _Store) -> Iterator[None]:
    """Keep what a block reads (layer 0) or returns, outside of what is checkpointed.

    Inside, where its hooks run, a new op would be lost or miscounted; and rows that are picked only after the
    forward would all get their gradient, at full length, before any block does.
    """
    checkpointed = checkpoint_of(replayer)
    assert checkpointed is not None

    def around(function: Any, *args: Any, **kwargs: Any) -> Any:
        is_block = replayer is block or getattr(function, "__self__", None) is block
        if is_block and layer == 0:
            store.keep(0, args[0] if args else function.keywords["hidden_states"])
        output = checkpointed(function, *args, **kwargs)
        if is_block and layer > 0:
            store.keep(layer, _tensor(output))
        return output

    set_checkpoint(replayer, around)
    try:
        yield
    finally:
        set_checkpoint(replayer, checkpointed)


def _tensor(output: object) -> Tensor:
    """The hidden states in what a block or a backbone returns."""
    state = getattr(output, "last_hidden_state", None)
    if state is None:
        state = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(state, Tensor)
    return state


def _stop(*_: object) -> None:
    raise _StopForward


def _check_layers(layers: Sequence[int], depth: int) -> None:
    if not layers or len(set(layers)) != len(layers):
        raise UserError(f"capture wants distinct layers, at least one; got {list(layers)}")
    if outside := [layer for layer in layers if not 0 <= layer <= depth]:
        raise UserError(f"layer {outside[0]} is outside 0..{depth}, the layers of this model")
