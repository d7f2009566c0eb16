"""The files of a model, and which of them cannot be read: libraries' errors seldom name the file."""

import fnmatch
import json
import os
import pickle
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from oprd.foundation.errors import is_of_the_machine, reason, whatever_fails_is

CONFIGS = (CONFIG_NAME, GENERATION_CONFIG_NAME, ADAPTER_CONFIG)
TOKENIZER_CONFIGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TOKENIZER_FILES = (*TOKENIZER_CONFIGS, "tokenizer.json", "vocab.json", "merges.txt")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
INDEXES = ("*.safetensors.index.json", "pytorch_model*.bin.index.json")
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
LFS_POINTER = b"version https://git-lfs"
MOST_PARTS = 10_000  # of a config: each layer or expert is an object of its own, and each label a text
COUNT = re.compile(r"n(um)?_.*(layer|label|expert)s?")
NEEDS_CODE = "it needs code that comes with it: read that, and set trust_remote_code to have it run"


def told_of(
    kind: str, name: str, files: Sequence[str], revision: str | None = None
) -> AbstractContextManager[None]:
    """Inside it, any error over a user's files becomes a `UserError` that names the model and the file.

    `files` are the names, or patterns, of those that were read.
    """

    def sentence(error: Exception) -> str:
        folder = folder_of(name, revision)
        said = unreadable(folder, files)
        if said is None and "trust_remote_code=True" in str(error):
            said = NEEDS_CODE
        elif said is None:
            said = reason(error)
            is_of_a_file = any(word in said for word in (".json", ".safetensors", ".bin", "chat template"))
            if folder is not None and not is_of_a_file:
                said += f" (see its {files[0]}, or the arguments it is loaded with)"
        return f"cannot load {kind} {name}: {said}"

    return whatever_fails_is(sentence)


def folder_of(name: str, revision: str | None = None) -> Path | None:
    """Where a model's files lie: its folder, or the Hub's cache; None if they are not here."""
    if os.path.isdir(path := os.path.expanduser(name)):
        return Path(path)
    try:
        cached = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    except (HFValidationError, OSError, ValueError):
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def unreadable(folder: Path | None, files: Sequence[str]) -> str | None:
    """The first file of a folder, among those that match `files`, that cannot be read on its own, and why."""
    if folder is None:
        return None
    for path in (folder / name for pattern in files for name in fnmatch.filter(os.listdir(folder), pattern)):
        try:
            _reader(path)(path)
        except Exception as error:
            if is_of_the_machine(error):
                raise
            return f"{path.name} cannot be read ({reason(error)})"
    return None


def read_mapping(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `ValueError` if there is another thing, and what reading raises."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"it holds no JSON object, but {type(value).__name__}")
    return value


def stored_types(path: Path) -> dict[str, str]:
    """By name of a weight in a file, the type of its numbers, such as `float32`; raises what reading does."""
    with path.open("rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError("it is a pointer of Git LFS: fetch the file itself with git lfs pull")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        return {key: TYPES.get(kind, kind) for key, kind in kinds.items()}
    try:
        weights = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it is no pickle of tensors alone, and nothing else is read") from error
    named = weights.items() if isinstance(weights, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(weight, torch.Tensor) for key, weight in named):
        raise ValueError("it holds no mapping of names to tensors")
    return {key: str(weight.dtype).removeprefix("torch.") for key, weight in weights.items()}


def _reader(path: Path) -> Callable[[Path], Any]:
    if path.is_symlink() and not path.exists():
        return _follow
    if path.name.endswith(".index.json"):
        return _read_index
    if path.name == CONFIG_NAME:
        return _read_config
    if path.suffix == ".json":
        return read_mapping
    return stored_types if path.suffix in (".safetensors", ".bin") else _read_text


def _read_text(path: Path) -> None:
    path.read_text(encoding="utf-8")


def _follow(link: Path) -> None:
    raise ValueError(f"it is a link to {os.readlink(link)}, and nothing is there")


def _read_config(path: Path) -> None:
    config = read_mapping(path)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if COUNT.fullmatch(key) and isinstance(value, int | float) and value > MOST_PARTS:
                raise ValueError(f"{key} is {value:.15g}, and no model has so many")


def _read_index(path: Path) -> None:
    index = read_mapping(path)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError("its weight_map names no files")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError("it has no object metadata: write an empty one")
    for shard in sorted(set(map(str, shards.values()))):
        if not (path.parent / shard).is_file():
            raise ValueError(f"it names {shard}, which is not there")
