"""Models by name: the bundled `tiny:…` ones, folders and Hub names, with errors that speak to the user."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from oprd.foundation.errors import UserError
from oprd.foundation.foreign.deepspeed import is_partitioned
from oprd.foundation.foreign.torch import is_fake
from oprd.models.checks import (
    check_adapters,
    check_ids,
    check_tokenizer,
    check_weights,
    loading_reported,
    try_tokenizer,
)
from oprd.models.files import (
    ADAPTER_CONFIG,
    CONFIGS,
    INDEXES,
    TOKENIZER_CONFIGS,
    TOKENIZER_FILES,
    WEIGHTS,
    folder_of,
    read_mapping,
    told_of,
    unreadable,
)
from oprd.models.init_kwargs import hub_kwargs as hub_keys

ADAPTER_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
TINY_MODELS = Path(__file__).parent / "tiny" / "models"


def resolve_model(name: str, **hub_kwargs: Any) -> str:
    """A name that `from_pretrained` takes: `tiny:student` becomes a folder, others are checked and kept.

    A folder of adapters stands for the model that they make of theirs.

    Raises `UserError` when no model is found there, or none that its config describes.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise UserError(f"{name!r} names no model: give a folder, a name of the Hub, or tiny:student")
    if name.startswith("tiny:"):
        bundled = {f"tiny:{path.name}": str(path) for path in sorted(TINY_MODELS.iterdir())}
        if name not in bundled:
            raise UserError(f"there is no bundled model {name}; the bundled ones are {', '.join(bundled)}")
        return bundled[name]
    path = os.path.expanduser(name)
    _check_folder(name, path)
    if holds_adapters(name):
        below, revision = base_model(name), _adapter_config(name).get("revision")
        resolve_model(below, **hub_kwargs | {"revision": revision or "main"})
        return path
    located = path if os.path.exists(path) else name
    with told_of("the model", name, CONFIGS, hub_kwargs.get("revision")):
        AutoConfig.from_pretrained(located, **{"trust_remote_code": False} | hub_kwargs)  # or it would ask
    return located


def _check_folder(name: str, path: str) -> None:
    """Raise `UserError` for a path that leads nowhere, and for a folder without a model."""
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{name} is a link to {os.readlink(path)}, and nothing is there")
    if not os.path.exists(path):
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"the model folder {name} does not exist")
        return
    if os.path.isdir(path) and (said := unreadable(Path(path), CONFIGS)):
        raise UserError(f"cannot load the model {name}: {said}")
    held = [file for file in (CONFIG_NAME, ADAPTER_CONFIG) if os.path.isfile(os.path.join(path, file))]
    if not held:
        raise UserError(f"{name} is not a model folder: it holds no {CONFIG_NAME}")
    if len(held) == 2:
        raise UserError(
            f"{name} holds a model ({CONFIG_NAME}) and adapters ({ADAPTER_CONFIG}): keep each in a folder "
            "of its own, and name the one that is meant"
        )


def holds_adapters(name: str) -> bool:
    """Whether a folder holds adapters and the name of the model they belong to, and no model."""
    path = os.path.expanduser(name)
    is_there = [os.path.isfile(os.path.join(path, file)) for file in (ADAPTER_CONFIG, CONFIG_NAME)]
    return is_there == [True, False]


def base_model(name: str) -> str:
    """The name of the model below a folder's adapters, and below any that these are on; a model's is its own.

    Raises `UserError` for adapters that name no model, or that lead back to themselves.
    """
    seen: list[str] = []
    while holds_adapters(name):
        folder = os.path.realpath(os.path.expanduser(name))
        if folder in seen:
            raise UserError(
                f"{folder}/{ADAPTER_CONFIG}: base_model_name_or_path leads back to these adapters, and to no "
                "model: write the name of the model that they were trained on"
            )
        seen.append(folder)
        name = _adapter_config(name)["base_model_name_or_path"]
    return name


def _adapter_config(folder: str) -> dict[str, Any]:
    path = Path(os.path.expanduser(folder)) / ADAPTER_CONFIG
    with told_of("the adapters", folder, [ADAPTER_CONFIG]):
        config = read_mapping(path)
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise UserError(f"{path} names no model that the adapters are on: set its base_model_name_or_path")
    if not isinstance(config.get("revision"), str | None):
        raise UserError(f"{path}: revision is {config['revision']!r}, which is no name of a revision")
    return config


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of the Hub that a resolved model name stands for at a revision; None for a folder."""
    return extract_commit_hash(cached_file(name, CONFIG_NAME, revision=revision), None)


def weights_are_here(model: nn.Module) -> bool:
    """Whether this process has a model's values: not in a plan, under ZeRO-3, or before FSDP sends them."""
    weight = next(model.parameters())
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if is_fake(local):  # asked anything more, a plan would count it as read
        return False
    awaited = weight.is_meta and not hasattr(model, "hf_device_map")
    return not awaited and not is_partitioned(weight)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate within the block; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's name, padding on the left; raises `UserError` if it has no tokens."""
    name = resolve_model(name, **kwargs)
    folder = folder_of(name, kwargs.get("revision"))
    if said := unreadable(folder, TOKENIZER_CONFIGS):  # which would go unnoticed
        raise UserError(f"cannot load the tokenizer of {name}: {said}")
    with told_of("the tokenizer of", name, TOKENIZER_FILES, kwargs.get("revision")):
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **kwargs)
        try_tokenizer(tokenizer)
        is_empty = len(tokenizer) <= len(tokenizer.added_tokens_decoder)
    if is_empty:  # made of nothing where its files are missing
        raise UserError(
            f"{name} holds no tokenizer, or one without tokens: put the files of the model's tokenizer "
            "(tokenizer.json, tokenizer_config.json) beside its weights"
        )
    return tokenizer


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """The causal language model of a name (a folder, a Hub name, `tiny:student`), each weight from its files.

    Adapters are merged into their base model in float32, as half precision would lose small ones; `dtype`
    casts the result. Raises `UserError` for files that cannot be read or do not fit the config.
    """
    name = resolve_model(name, **hub_keys(kwargs))
    if holds_adapters(name):
        return _merged(name, kwargs)
    revision = kwargs.get("revision")
    with told_of("the model", name, (*CONFIGS, *INDEXES, *WEIGHTS), revision):
        with loading_reported(name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
            model, found = loaded
        check_weights(name, model, found, folder_of(name, revision))
    check_ids(name, model)
    return model


def load_with_tokenizer(name: str, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a name and its tokenizer; raises `UserError` unless they fit each other."""
    tokenizer = load_tokenizer(name, **hub_keys(kwargs))
    model = load_model(name, **kwargs)
    check_tokenizer(name, model, tokenizer)
    return model, tokenizer


def _merged(name: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    config, dtype = _adapter_config(name), kwargs.get("dtype")
    given = kwargs | {"dtype": "float32", "revision": config.get("revision")}
    base = load_model(config["base_model_name_or_path"], **given)
    with told_of("the adapters", name, (ADAPTER_CONFIG, *WEIGHTS)):
        kind = PeftConfig.from_pretrained(name)
        if kind.task_type not in (TaskType.CAUSAL_LM, None):
            raise ValueError(f"its task_type is {kind.task_type}, and only CAUSAL_LM is distilled")
        if not any(os.path.lexists(os.path.join(name, file)) for file in ADAPTER_WEIGHTS):
            raise ValueError(f"it holds no {' and no '.join(ADAPTER_WEIGHTS)}")
        rank, widest = getattr(kind, "r", 0), max(n for weight in base.parameters() for n in weight.shape)
        if isinstance(rank, int) and rank > widest:
            raise ValueError(f"its r is {rank}, and no weight of the model is wider than {widest}")
        with torch.random.fork_rng(devices=()):  # peft draws adapters before it loads them
            wide = PeftModelForCausalLM(base, kind)
        check_adapters(name, wide, wide.load_adapter(name, "default"))
        merged: PreTrainedModel = wide.merge_and_unload()
    if dtype in ("auto", None):
        return merged
    return merged.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
