"""Models and optimisers as a run would make them, with weights on the meta device or fake."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from oprd.foundation.errors import UserError
from oprd.models.files import CONFIGS, told_of
from oprd.models.init_kwargs import hub_kwargs


class _EightBit(torch.optim.Optimizer):
    """The state of bitsandbytes' optimisers: two bytes a weight, and two float32 scales for 256 of them."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for weight in self.param_groups[0]["params"]:
            if weight not in self.state:
                state = [weight.new_zeros(weight.numel(), dtype=torch.uint8) for _ in range(2)]
                scales = weight.new_zeros(2, -(-weight.numel() // 256), dtype=torch.float32)
                self.state[weight] = {"state": state, "scales": scales}


def make_optimizer(settings: Any, student: Any, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a run; raises `UserError` for one that cannot be had."""
    if "8bit" in settings.optim:
        return _EightBit(trained, {})
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(settings, student)
    except (ImportError, ValueError) as error:
        raise UserError(f"optim: {settings.optim}: {error}") from error
    return kind(trained, **kwargs)


def on_meta(located: str, given: dict[str, Any]) -> tuple[Any, bool]:
    """The model of a config in the dtype that the run loads it in, and whether its file has that dtype.

    On a CPU such weights are mapped from the file: what is never read takes no memory. Raises `UserError` for
    a config that no model can be made of.
    """
    config = AutoConfig.from_pretrained(located, **hub_kwargs(given))
    stored, wanted = config.dtype, given["dtype"]
    if wanted in ("auto", None):
        wanted = stored or torch.float32
    kwargs = {key: given[key] for key in ("attn_implementation", "trust_remote_code") if key in given}
    with told_of("the model", located, CONFIGS), torch.device("meta"):
        wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, **kwargs)
    return model, wanted == stored
