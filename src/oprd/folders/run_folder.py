"""A training run as a folder: what may be resumed, what is refused, and what a finished run leaves.

The folder holds the final model, `checkpoint-*`, `metrics.jsonl` and `resolved.yaml`.
"""

import importlib.metadata
import logging
import math
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from oprd.folders.deciding import DECIDING
from oprd.folders.fingerprint import Fingerprints
from oprd.folders.whole import write_whole
from oprd.foundation.errors import UserError

logger = logging.getLogger(__name__)

RESOLVED_FILE = "resolved.yaml"
STATE_FILE = "trainer_state.json"
PACKAGES = ("oprd", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy")
# Their product is what a step computes.
BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
RESULTS = ("checkpoint-*", "config.json", "adapter_config.json", "bridge.safetensors")

Inputs = dict[str, Fingerprints]  # of what a key names


@dataclass(frozen=True)
class Record:
    """What `resolved.yaml` says: every setting, fingerprints of what some of them name, package versions."""

    settings: dict[str, Any]
    inputs: Inputs
    versions: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises `UserError` for a file that is not `resolved.yaml`."""
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
            parts = [dict(stored[part]) for part in ("settings", "versions")]
            inputs = {key: dict(value) for key, value in (stored.get("inputs") or {}).items()}
            if not all(isinstance(key, str) for part in (*parts, inputs) for key in part):
                raise ValueError("a key is no text")
        except (
            OSError,
            yaml.YAMLError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as error:
            raise UserError(
                f"{path} is damaged, so what that run computes is not known: choose another output_dir, "
                "or delete that folder"
            ) from error
        return cls(parts[0], inputs, parts[1])


def output_folder(args: TrainingArguments) -> Path:
    """Where a run is written, which transformers' arguments know once they are made."""
    assert args.output_dir is not None
    return Path(args.output_dir)


def resolved_settings(*arguments: Any) -> dict[str, Any]:
    """Every key of the given dataclasses with the value it ended up with, as plain YAML values."""
    settings = {}
    for argument in arguments:
        for field in fields(argument):
            if field.init:
                settings[field.name] = _plain(getattr(argument, field.name))
    return settings


def default_settings(*arguments: Any) -> dict[str, Any]:
    """The defaults of their keys, as plain YAML values."""
    named = {field.name: field.default for argument in arguments for field in fields(argument)}
    return {name: _plain(value) for name, value in named.items() if value is not MISSING}


def check_folder(
    folder: Path, settings: dict[str, Any], inputs: Inputs, defaults: dict[str, Any] | None = None
) -> None:
    """Refuse a folder that holds a run of another objective, model or dataset, or another model.

    Compared are the keys that decide what a run computes, and the fingerprints of what they name (`inputs`);
    without fingerprints of it, a name stands for its content. A key that an older version did not record had
    its default. What cannot be compared is logged. A folder in which nothing was trained may become any run.

    Raises `UserError` naming the first key that differs.
    """
    resolved = folder / RESOLVED_FILE
    if not resolved.exists() or not holds_results(folder):
        return
    if not resolved.exists():
        raise UserError(f"{folder} holds a model that is not a run of oprd: choose another output_dir")
    stored = Record.read(resolved)
    known = stored.settings | _defaults_of_older(stored, settings, defaults or {})
    for key in DECIDING:
        if key in settings and key in known:
            _check_key(folder, key, _word(known[key]), settings[key], stored.inputs.get(key), inputs.get(key))
    _check_batch(folder, stored.settings, settings)
    _tell_differences(folder, stored, settings, inputs, known)


def holds_results(folder: Path) -> bool:
    """Whether anything was trained or fitted in a folder, or a model put there."""
    metrics = folder / "metrics.jsonl"
    return any(any(folder.glob(name)) for name in RESULTS) or (
        metrics.exists() and metrics.stat().st_size > 0
    )


def _check_key(
    folder: Path, key: str, was: Any, now: Any, was_made_of: Fingerprints | None, made_of: Fingerprints | None
) -> None:
    if was_made_of is None or made_of is None:
        if was != now:
            raise _another_run(folder, key, was, now)
        return
    for part, fingerprint in made_of.items():
        if was_made_of.get(part) == fingerprint:
            continue
        if was != now:
            raise _another_run(folder, key, was, now)
        raise UserError(
            f"{folder} holds a run whose {key}: {now} has been changed since ({part}: "
            f"{was_made_of.get(part)}, now {fingerprint}): put back what it was, or choose another output_dir"
        )


def _another_run(folder: Path, key: str, was: Any, now: Any) -> UserError:
    return UserError(
        f"{folder} holds a run with {key}: {was}, not {now}: choose another output_dir, or delete that "
        "folder to start over"
    )


def _check_batch(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    if not all(isinstance(settings.get(key), int) for settings in (was, now) for key in BATCH_KEYS):
        return
    rollouts = [math.prod(settings[key] for key in BATCH_KEYS) for settings in (was, now)]
    if rollouts[0] != rollouts[1]:
        raise UserError(
            f"{folder} holds a run of {rollouts[0]} rollouts per step, and this would be {rollouts[1]}: keep "
            "per_device_train_batch_size × gradient_accumulation_steps × processes as it was"
        )


def _defaults_of_older(stored: Record, settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Values of keys that an older version did not have: their defaults; none if it is this version."""
    if all(stored.versions.get(name) == version for name, version in _versions().items()):
        return {}
    return {key: defaults.get(key) for key in settings.keys() - stored.settings.keys()}


def _tell_differences(
    folder: Path, stored: Record, settings: dict[str, Any], inputs: Inputs, known: dict[str, Any]
) -> None:
    """One line for each kind of thing that could not be compared."""
    record = folder / RESOLVED_FILE
    unrecorded = [key for key in (*DECIDING, *BATCH_KEYS) if key in settings and key not in known]
    if unrecorded:
        values = ", ".join(f"{key}: {settings[key]}" for key in unrecorded)
        logger.warning(
            "%s does not say what these were, and they are taken as they are now: %s", record, values
        )
    unknown = sorted(stored.settings.keys() - settings.keys())
    if unknown:
        logger.warning("%s has keys that are not known here and not compared: %s", record, ", ".join(unknown))
    if inputs.keys() - stored.inputs.keys():
        names = ", ".join(sorted(inputs.keys() - stored.inputs.keys()))
        logger.warning("%s has no fingerprints of %s: only names are compared", record, names)
    others = {
        name: (was, now)
        for name, now in _versions().items()
        if (was := stored.versions.get(name)) not in (None, now)
    }
    if others:
        words = ", ".join(f"{name} {was} (now {now})" for name, (was, now) in others.items())
        logger.warning("%s was last run with %s", folder, words)


def write_resolved(folder: Path, settings: dict[str, Any], inputs: Inputs) -> None:
    """Write `resolved.yaml`: settings, fingerprints, package versions, Python, git commit."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "inputs": inputs, "versions": _versions(), "git_commit": _git_commit()}
    write_whole(folder / RESOLVED_FILE, yaml.safe_dump(record, sort_keys=True, allow_unicode=True))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    return value if type(value) in (str, int, float, bool, type(None)) else str(value)


def _word(value: Any) -> Any:
    """A value as it is written today; earlier folders have `SchedulerType.COSINE` for `cosine`."""
    is_enum = isinstance(value, str) and value.startswith(("SchedulerType.", "OptimizerNames."))
    return value.rpartition(".")[2].lower() if is_enum else value


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
