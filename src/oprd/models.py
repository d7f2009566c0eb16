"""Models by name: the bundled `tiny:…` ones, folders and Hub names, with errors that speak to the user."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
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

from oprd.errors import UserError

ADAPTER_FILE = "adapter_config.json"
TINY_MODELS = Path(__file__).parent / "tiny" / "models"


def resolve_model(name: str, **hub_kwargs: Any) -> str:
    """A name that `from_pretrained` takes: `tiny:student` becomes a folder, others are checked and kept.

    A folder of adapters stands for the model that they make of theirs.

    Raises `UserError` when no model is found there.
    """
    if name.startswith("tiny:"):
        folder = TINY_MODELS / name.removeprefix("tiny:")
        if not folder.is_dir():
            known = ", ".join(f"tiny:{path.name}" for path in sorted(TINY_MODELS.iterdir()))
            raise UserError(f"there is no bundled model {name}; the bundled ones are {known}")
        return str(folder)
    path = Path(name).expanduser()
    if holds_adapters(name):
        revision = _adapter_config(name).get("revision")
        resolve_model(base_model(name), **hub_kwargs | {"revision": revision or "main"})
        return str(path)
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"{name} is not a model folder: it holds no config.json")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"the model folder {name} does not exist")
    located = str(path) if path.exists() else name
    try:
        AutoConfig.from_pretrained(located, **{"trust_remote_code": False} | hub_kwargs)  # or it would ask
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name}: {_reason(error)}") from error
    return located


def holds_adapters(name: str) -> bool:
    """Whether a folder holds adapters and the name of the model they belong to, and no model."""
    path = Path(name).expanduser()
    return (path / ADAPTER_FILE).is_file() and not (path / "config.json").is_file()


def base_model(name: str) -> str:
    """The name of the model that a folder of adapters belongs to; that of a model is its own."""
    if not holds_adapters(name):
        return name
    return _adapter_config(name)["base_model_name_or_path"]


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of the Hub that a resolved model name stands for at a revision; None for a folder."""
    return extract_commit_hash(cached_file(name, CONFIG_NAME, revision=revision), None)


def _adapter_config(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder).expanduser() / ADAPTER_FILE).read_text())


def weights_are_here(model: nn.Module) -> bool:
    """Whether this process has a model's values: not in a plan, under ZeRO-3, or before FSDP sends them."""
    weight = next(model.parameters())
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if isinstance(local, FakeTensor):  # asked anything more, a plan would count it as read
        return False
    awaited = weight.is_meta and not hasattr(model, "hf_device_map")
    return not awaited and not hasattr(weight, "ds_id")


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
    """The tokenizer of a resolved model name, padding on the left."""
    try:
        return AutoTokenizer.from_pretrained(name, padding_side="left", **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a tokenizer from {name}: {_reason(error)}") from error


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """The causal language model of a resolved model name.

    Adapters are merged into theirs in float32, since half precision would lose small ones, and stay so
    unless `dtype` names another.
    """
    try:
        if holds_adapters(name):
            with torch.random.fork_rng(devices=()):  # peft draws adapters before it loads them
                wide = AutoPeftModelForCausalLM.from_pretrained(name, **kwargs | {"dtype": "float32"})
            dtype = kwargs.get("dtype", "auto")
            dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
            merged = wide.merge_and_unload()
            return merged if dtype in ("auto", None) else merged.to(dtype)
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if "trust_remote_code=True" in str(error):
        return "it needs code that comes with it: read that, and set trust_remote_code to have it run"
    return str(error).strip().partition("\n")[0]
