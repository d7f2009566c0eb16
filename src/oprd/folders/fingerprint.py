"""What a run is made from, identified by content: weights, tokenizers, prompts and bridges.

A name says nothing of what lies there now. Files up to 64 MiB are read whole, larger ones at 4,096 places, so
a fingerprint costs seconds and finds other weights, but not one changed number in billions.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor

from oprd.models.files import ADAPTER_CONFIG
from oprd.models.loading import base_model, commit_of, holds_adapters, resolve_model

WHOLE_BYTES = 64 * 2**20
PLACES, BYTES_AT_A_PLACE = 4096, 512
ROWS_AT_A_TIME = 1000
VALUES = 1024
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.py")
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template*", "additional_chat_templates/*"),
)
CONFIGS = ("config.json", ADAPTER_CONFIG)
UNDECISIVE = ("transformers_version", "_name_or_path", "peft_version")  # keys of a config

Fingerprints = dict[str, str]


def model_fingerprints(name: str, **hub_kwargs: Any) -> Fingerprints:
    """Fingerprints of a named model: the `commit` on the Hub, or a folder's `weights` and `tokenizer`.

    Those of adapters include the model that they belong to. Raises `UserError` where there is no model.
    """
    located = resolve_model(name, **hub_kwargs)
    folder = Path(located)
    if not folder.is_dir():
        return {"commit": str(commit_of(located, hub_kwargs.get("revision")))}
    weights = hashlib.sha256()
    for config in CONFIGS:
        if (folder / config).is_file():
            weights.update(_config_digest(folder / config))
    if holds_adapters(located):
        weights.update(json.dumps(model_fingerprints(base_model(located))).encode())
    weights.update(_digest(folder, WEIGHTS))
    return {"weights": weights.hexdigest()[:16], "tokenizer": _digest(folder, TOKENIZER).hex()[:16]}


def file_fingerprint(path: Path) -> str:
    """The fingerprint of one file."""
    return _file_digest(path).hex()[:16]


def rows_fingerprint(rows: Dataset) -> str:
    """The fingerprint of all rows of a dataset, in their order."""
    digest = hashlib.sha256()
    for batch in rows.iter(ROWS_AT_A_TIME):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def sampled(weight: Tensor) -> Tensor:
    """About a thousand evenly spaced values of a weight of a model that is loaded."""
    return weight.detach().flatten()[:: max(1, weight.numel() // VALUES)]


def _digest(folder: Path, patterns: Iterable[str]) -> bytes:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode() + _file_digest(path))
    return digest.digest()


def _file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for place in range(PLACES):
                file.seek(place * (size - BYTES_AT_A_PLACE) // (PLACES - 1))
                digest.update(file.read(BYTES_AT_A_PLACE))
    return digest.digest()


def _config_digest(path: Path) -> bytes:
    try:
        config = json.loads(path.read_bytes())
        kept = {key: value for key, value in config.items() if key not in UNDECISIVE}
    except (ValueError, AttributeError):  # loading the model will say what is wrong with it
        return _file_digest(path)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).digest()
