"""The last token of a rollout: where Hugging Face's cache is fullest."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from oprd.rollouts.generation import warpers
from oprd.rollouts.rows import Inputs


@torch.no_grad()
def sample_last_token(model: PreTrainedModel, rollouts: Inputs, settings: Any) -> Tensor:
    """Sample the last token of `rollouts` as `generate` would, after a prompt that is read and a full cache.

    The tokens between have left zeros in the cache. `settings` names temperature, top_k, top_p and min_p.
    """
    ids, written = rollouts["prompt_ids"], rollouts["completion_ids"]
    prompt_mask = rollouts["prompt_mask"].to(ids.device)
    was_training = model.training
    model.eval()
    cache = DynamicCache(config=model.config.get_text_config())
    model(input_ids=ids, attention_mask=prompt_mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    _lengthen(cache, written.shape[1] - 2)
    mask = torch.cat([prompt_mask, torch.ones_like(written[:, 1:])], dim=1)
    last = written[:, -2:-1] if written.shape[1] > 1 else ids[:, -1:]
    output = model(
        input_ids=last,
        attention_mask=mask,
        position_ids=mask.sum(-1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    model.train(was_training)
    scores = output.logits[:, -1].to(torch.float32, copy=True)
    cut = warpers(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
    likely = cut(ids, scores).softmax(-1)
    return torch.multinomial(likely, num_samples=1)


def _lengthen(cache: DynamicCache, tokens: int) -> None:
    for number, layer in enumerate(cache.layers):
        if tokens > 0:
            keys, values = (x.new_zeros(*x.shape[:2], tokens, x.shape[3]) for x in (layer.keys, layer.values))
            cache.update(keys, values, number)
