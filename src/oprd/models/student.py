"""The student by name: loaded as TRL would load it, with our checks."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from oprd.foundation.errors import UserError
from oprd.models.init_kwargs import student_kwargs
from oprd.models.loading import holds_adapters, load_model, load_with_tokenizer


def load_student(
    name: str, settings: Any, processing_class: Any = None, quantization_config: Any = None
) -> tuple[PreTrainedModel, Any]:
    """The model of a name in float32, unless `settings.model_init_kwargs` names a dtype, and its tokenizer.

    A `processing_class` that is given stands for the tokenizer. One process alone spreads the model over its
    accelerators, as TRL does. Raises `UserError` for what cannot be loaded or is no text model.
    """
    given = {"dtype": "float32"} | student_kwargs(settings)
    if quantization_config is not None:
        if "quantization_config" in given:
            raise UserError("quantization_config is given twice, and in model_init_kwargs too: drop one")
        given["quantization_config"] = quantization_config
    if settings.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        given["device_map"] = None
    elif settings.distributed_state.device.type not in ("cpu", "mps"):
        given.setdefault("device_map", "auto")
    if holds_adapters(name):
        raise UserError(f"{name} holds adapters, which are not trained further: name its folder merged")
    if processing_class is None:
        model, processing_class = load_with_tokenizer(name, **given)
        processing_class.truncation_side = "left"
    else:
        model = load_model(name, **given)
    if model.config.get_text_config() is not model.config:
        raise UserError(f"{name} is a vision-language model, or another of several parts: name a text model")
    return model, processing_class


def has_dropout(model: nn.Module) -> bool:
    """Whether a model drops states at random, adapters aside."""
    layers = (module for name, module in model.named_modules() if "lora_dropout" not in name)
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in layers)


def name_of(model: str | PreTrainedModel | None) -> str:
    """What to call a model in its card: its name, or its class if it was made in memory."""
    if model is None or isinstance(model, str):
        return model or ""
    return model.config.name_or_path or type(model).__name__
