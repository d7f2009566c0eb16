"""Does a batch change what a model makes of a rollout? Attention masks padding; some recurrent layers do not.

Whether a model is one of these is tried on a few tokens, since no field of its config shows it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from oprd.foundation.errors import UserError
from oprd.foundation.foreign.accelerate import is_dispatched
from oprd.models.capture import backbone, capture, num_layers
from oprd.models.generation_config import generation_config_aside
from oprd.models.loading import eval_mode, weights_are_here
from oprd.models.precision import half_precision, own_autocast

SHORT, LONG = 4, 12  # tokens of the two sequences that are tried
NEW_TOKENS = 3
# ‖batched − alone‖ / ‖alone‖. Rounding is 1e-6 in float32 (5e-4 as TF32) and up to 0.04 in half precision; of
# models that fail it is 0.1 to 1.
TOLERANCE, HALF_TOLERANCE = 5e-3, 0.1

_found: dict[tuple[str, str], Any] = {}  # by question and architecture
_architectures: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def heeds_padding(model: nn.Module, device: torch.device | None = None) -> bool:
    """Whether padding on the left leaves a model's states as they were.

    A model whose weights are elsewhere (in a plan, under ZeRO-3) or sharded is not tried, and taken to heed
    it; `check_sharded` tries before. `device` is where token ids go, by default the model's.
    """
    return _once("heeds", model, lambda: not _states_shift(model, device) > _tolerance(model), True)


def check_sharded(models: Iterable[Any]) -> None:
    """Raise `UserError`, on all ranks, for a model that ignores padding and is going to be sharded.

    Read without padding, ranks would run unequal numbers of forwards, and wait for each other for ever.
    """
    ignoring = [type(model).__name__ for model in models if not heeds_padding(model)]
    for name in gather_object(ignoring)[:1]:  # rank 0 alone may have the weights
        raise UserError(
            f"{name} reads padding as text, so rollouts are read in groups of one length, which FSDP cannot "
            "do: run it without FSDP"
        )


def generation_batches(model: nn.Module, prompt_ids: Sequence[list[int]]) -> list[list[int]]:
    """The prompts, by index, that `generate` may continue together: all, those of one length, or one."""
    lengths = [len(ids) for ids in prompt_ids]
    if len(lengths) < 2 or (kind := _batch_kind(model)) == "any":
        return [list(range(len(lengths)))]
    if kind == "single":
        return [[i] for i in range(len(lengths))]
    return [[i for i, n in enumerate(lengths) if n == length] for length in dict.fromkeys(lengths)]


def in_batches(batches: Sequence[Sequence[int]], draw: Callable[[Sequence[int]], Iterable[Any]]) -> list[Any]:
    """What `draw` makes of every batch of indices, in the order of the indices."""
    drawn = {i: result for batch in batches for i, result in zip(batch, draw(batch), strict=True)}
    return [drawn[i] for i in sorted(drawn)]


def _batch_kind(model: Any) -> str:
    def find() -> str:
        lengths = {"any": (SHORT, LONG), "one length": (SHORT, SHORT)}
        fit = (kind for kind, pair in lengths.items() if not _logits_shift(model, *pair) > _tolerance(model))
        return next(fit, "single")

    return _once("batches", model, find, "any")


def _once(question: str, model: Any, find: Callable[[], Any], untried: Any) -> Any:
    """The cached answer for this architecture, or a new one."""
    stack = backbone(model)
    if stack not in _architectures:
        _architectures[stack] = f"{type(stack).__name__} {stack.config}"
    key = question, _architectures[stack]
    if key not in _found and not _can_be_tried(model):
        return untried
    if key not in _found:
        _found[key] = find()
    return _found[key]


def _can_be_tried(model: nn.Module) -> bool:
    is_offloaded = is_dispatched(model)  # accelerate brings weights when they are needed
    return is_offloaded or (weights_are_here(model) and not isinstance(next(model.parameters()), DTensor))


def _tolerance(model: Any) -> float:
    is_half = half_precision(model) is not None or getattr(model, "is_quantized", False)
    return HALF_TOLERANCE if is_half else TOLERANCE


@torch.no_grad()
def _states_shift(model: Any, device: torch.device | None) -> float:
    """How far a longer neighbour moves the last states of a short sequence, relative to these."""
    device = model.device if device is None else device
    ids, mask = _pair(model, SHORT, LONG, device)
    with eval_mode(model), own_autocast(model):
        batched = _last_states(model, ids, mask)[0, -SHORT:]
        alone = _last_states(model, ids[:1, -SHORT:], mask[:1, -SHORT:])[0]
    return _distance(batched, alone)


@torch.no_grad()
def _logits_shift(model: Any, first: int, second: int) -> float:
    """How far a neighbour moves the logits of the first of two sequences that are continued, at most."""
    ids, mask = _pair(model, first, second, model.device)
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    with eval_mode(model), generation_config_aside(model), own_autocast(model):
        batched = model.generate(ids, attention_mask=mask, generation_config=config)
        alone = model.generate(ids[:1, -first:], attention_mask=mask[:1, -first:], generation_config=config)
    agree = batched.sequences[0, -NEW_TOKENS:] == alone.sequences[0, -NEW_TOKENS:]
    count = min(int(agree.long().cumprod(0).sum()) + 1, NEW_TOKENS)  # up to logits that read the same text
    pairs = zip(batched.logits[:count], alone.logits[:count], strict=True)
    return max(_distance(here[0], there[0]) for here, there in pairs)


def _pair(
    model: Any, first: int, second: int, device: torch.device
) -> tuple[Int[Tensor, "2 S"], Int[Tensor, "2 S"]]:
    """Two sequences of `first` and `second` tokens, padded on the left with other tokens, and their mask."""
    longest = max(first, second)
    ids = torch.arange(2 * longest, device=device).reshape(2, -1) % model.config.get_text_config().vocab_size
    lengths = torch.tensor([[first], [second]], device=device)
    return ids, (torch.arange(longest, device=device) >= longest - lengths).long()


def _last_states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    layer, positions = num_layers(model), (mask.cumsum(-1) - 1).clamp(min=0)
    with capture(model, [layer], stop_early=True) as states:
        backbone(model)(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return states[layer]


def _distance(here: Tensor, there: Tensor) -> float:
    return ((here.float() - there.float()).norm() / there.float().norm()).item()
