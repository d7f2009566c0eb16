"""The longest rollout that a run can meet, and its last token: there Hugging Face's cache is fullest."""

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from oprd.rollouts.generation import warpers
from oprd.rollouts.intake import UsablePrompts
from oprd.rollouts.rows import RolloutInputs
from oprd.rollouts.translation import Translation
from oprd.text.messages import Prompt
from oprd.text.rendering import Renderer

ANY_LENGTH = 1024  # stands for an endless response, where max_completion_length is none


@dataclass(frozen=True)
class Longest:
    """The dataset's longest prompt, as it stands there and in ids, and the longest response to it.

    The response repeats the prompt's text, so that the teacher's tokenizer, the second, has text to cut.
    """

    prompt: Prompt
    prompt_ids: list[int]
    response_ids: list[int]
    tokenizers: tuple[Any, Any]
    translation: Translation

    @classmethod
    def of(
        cls, prompts: UsablePrompts, render: Renderer, length: int | None, teacher: Any, read: Translation
    ) -> "Longest":
        """The longest of `prompts` and a response of `length` tokens."""
        prompt = prompts.dataset[int(prompts.lengths[0].argmax())]["prompt"]
        (rendered,) = render([prompt])
        special = set(render.tokenizer.all_special_ids)
        text = [i for i in rendered if i not in special] or rendered
        response = list(islice(cycle(text), length or ANY_LENGTH))
        return cls(prompt, rendered, response, (render.tokenizer, teacher), read)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    def rollouts(self, count: int, device: torch.device) -> RolloutInputs:
        """A batch of `count` such rollouts; all but the first miss a token, so that there is padding."""
        prompt_ids = torch.tensor(self.prompt_ids).repeat(count, 1)
        prompt_mask = torch.ones_like(prompt_ids)
        if len(self.prompt_ids) > 1:
            prompt_ids[1:, 0] = prompt_mask[1:, 0] = 0
        ids = torch.tensor(self.response_ids).expand(count, -1).contiguous()
        return {
            "prompt_ids": prompt_ids.to(device),
            "prompt_mask": prompt_mask,
            "completion_ids": ids.to(device),
            "completion_mask": torch.ones_like(ids),
        }


def rollouts_at_once(settings: Any, longest: Longest) -> tuple[int, int]:
    """How many of the longest rollouts one micro-batch holds, and how many micro-batches a step has."""
    micro_batch, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    if settings.max_tokens_per_micro_batch is None:
        return micro_batch, accumulation
    window = micro_batch * accumulation
    size = min(max(settings.max_tokens_per_micro_batch // longest.num_tokens, 1), window)
    return size, -(-window // size)


@torch.no_grad()
def sample_last_token(model: PreTrainedModel, rollouts: RolloutInputs, settings: Any) -> Tensor:
    """Sample the last token of `rollouts` as `generate` would, after a prompt that is read and a full cache.

    The tokens between have left zeros in the cache. `settings` names temperature, top_k, top_p and min_p.
    """
    ids, written = rollouts["prompt_ids"], rollouts["completion_ids"]
    prompt_mask = rollouts["prompt_mask"].to(ids.device)
    was_training = model.training
    model.eval()
    cache = DynamicCache(config=model.config.get_text_config())
    reading = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    model(input_ids=ids, attention_mask=prompt_mask, **reading)
    if (between := written.shape[1] - 2) > 0:
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            keys, values = (
                x.new_zeros(*x.shape[:2], between, x.shape[3]) for x in (layer.keys, layer.values)
            )
            cache.update(keys, values, number)
    mask = torch.cat([prompt_mask, torch.ones_like(written[:, 1:])], dim=1)
    last = written[:, -2:-1] if written.shape[1] > 1 else ids[:, -1:]
    positions = mask.sum(-1, keepdim=True) - 1
    output = model(input_ids=last, attention_mask=mask, position_ids=positions, **reading)
    model.train(was_training)
    scores = output.logits[:, -1].to(torch.float32, copy=True)
    cut: Any = warpers(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
    return torch.multinomial(cut(ids, scores).softmax(-1), num_samples=1)
