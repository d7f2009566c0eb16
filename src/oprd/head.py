"""The LM head of a Hugging Face model as a function of final states, for output losses alone."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oprd.capture import backbone
from oprd.errors import UserError


@dataclass(frozen=True)
class Head:
    """logits = cap · tanh(scale · W h / cap) over the first `vocabulary` tokens."""

    linear: nn.Module
    scale: float
    softcap: float | None
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module, vocabulary: int) -> "Head":
        """The head of `model`; raises `UserError` if it does not give the model's own logits."""
        causal: Any = model
        config = causal.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        head = cls(causal.get_output_embeddings(), _scale(config), softcap, vocabulary)
        head._check(causal)
        return head

    def __call__(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits in float32 or wider of final, normed states."""
        logits = self.linear(rows)[:, : self.vocabulary]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @torch.no_grad()
    def _check(self, model: Any) -> None:
        """Architectures scale their logits in ways no list of ours can keep up with: compare once."""
        ids = torch.arange(4, device=model.device)[None] % self.vocabulary
        training = model.training
        model.eval()
        expected = model(input_ids=ids, use_cache=False).logits[0, :, : self.vocabulary].float()
        states = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        model.train(training)
        given = self(states).float()
        if (given - expected).abs().max() > 0.05 * expected.abs().max().clamp(min=1):
            raise UserError(
                f"the LM head of {type(model).__name__} applied to its final states does not give its "
                "logits, so output losses would be wrong; use output_loss: none with this model"
            )


def _scale(config: Any) -> float:
    """The multiplier between W h and the logits, under the names that architectures give it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
