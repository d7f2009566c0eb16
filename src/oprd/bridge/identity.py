"""Which models a bridge was fitted between: enough to refuse any others."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.bridge.artifact import Bridge
from oprd.folders.fingerprint import sampled
from oprd.foundation.errors import UserError
from oprd.models.capture import num_layers
from oprd.models.loading import weights_are_here

ADAPTER_PARTS = ("modules_to_save.", "trainable_tokens_")
ADAPTER_WRAPPERS = (".base_layer.", ".original_module.", ".token_adapter.")
# How a checkpoint was written or is run, not what it is. Trainers set the special tokens to the tokenizer's.
VOLATILE_KEYS = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}


def identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Name, shape and fingerprints of a model and its tokenizer, as plain JSON."""
    config = model.config.get_text_config()
    weights = {"weights": weights_fingerprint(model)} if weights_are_here(model) else {}
    return weights | {
        "name": model.config.name_or_path,
        "architecture": type(_base(model)).__name__,
        "num_layers": num_layers(model),
        "width": config.hidden_size,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }


def check_models(bridge: Bridge, student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Raise `UserError` unless the bridge was fitted between models of these identities.

    A bridge that was fitted in memory names no models; then only widths and depths are compared.
    """
    for role, found in (("student", student), ("teacher", teacher)):
        for layer, projector in bridge.projectors.items():
            side, number = (
                (projector.student, layer)
                if role == "student"
                else (
                    projector.teacher,
                    projector.teacher_layer,
                )
            )
            if side.shape[1] != found["width"] or number > found["num_layers"]:
                raise UserError(
                    f"the bridge joins layer {number}, {side.shape[1]} wide, of a {role}, but this {role} "
                    f"has {found['num_layers']} layers {found['width']} wide: it belongs to another pair"
                )
        stored = bridge.metadata.get(role)
        for key in ("architecture", "num_layers", "width", "weights", "tokenizer"):
            if stored is not None and key in found and stored.get(key) != found[key]:
                raise UserError(
                    f"the bridge was fitted for the {role} {stored.get('name')} and this is {found['name']} "
                    f"({key}: {stored.get(key)}, here {found[key]}): fit a bridge for this pair with oprd "
                    "bridge"
                )


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A digest of the config and of evenly spaced values of every weight, adapters aside.

    Values are rounded to bfloat16 first, so a checkpoint has one fingerprint in any dtype that holds it.
    """
    base = _base(model)
    config = {key: value for key, value in base.config.to_dict().items() if key not in VOLATILE_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, shape, values in _samples(model):
        digest.update(f"{name}{shape}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """A digest of the vocabulary; None without a tokenizer."""
    if tokenizer is None:
        return None
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _samples(model: Any) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Name, shape and sampled values of the model's own parameters, wherever accelerate has put them."""
    base = _base(model)
    skipped = (*ADAPTER_PARTS, model.base_model.prefix) if hasattr(model, "peft_config") else ()
    tied = base.get_output_embeddings() if base.config.get_text_config().tie_word_embeddings else None
    found = {}
    for prefix, module in base.named_modules():
        if module is tied:
            continue
        with align_module_device(module):
            for leaf, weight in module.named_parameters(recurse=False):
                name = f"{prefix}.{leaf}"
                if any(part in name for part in skipped):
                    continue
                for wrapper in ADAPTER_WRAPPERS:
                    name = name.replace(wrapper, ".")
                found[name] = tuple(weight.shape), _sampled(weight)
    yield from ((name, *found[name]) for name in sorted(found))


def _sampled(weight: Tensor) -> Tensor:
    return sampled(weight).to(torch.bfloat16).cpu().view(torch.int16)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model
