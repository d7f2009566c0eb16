"""A training run as a folder: what may be resumed, what is refused, and what a finished run leaves.

The folder holds the final model, `checkpoint-*`, `metrics.jsonl` and `resolved.yaml`.
"""

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from oprd.errors import UserError

RESOLVED_FILE = "resolved.yaml"
STATE_FILE = "trainer_state.json"
PACKAGES = ("oprd", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy")
# How a run is carried out, not what it computes: these may differ when a run is resumed.
EXECUTION_PREFIXES = (
    "save_",
    "logging_",
    "log_",
    "report_to",
    "push_to_hub",
    "hub_",
    "dataloader_",
    "accuracy_",
    "diagnostics_",
)
EXECUTION_KEYS = {
    "output_dir",
    "max_steps",
    "run_name",
    "disable_tqdm",
    "resume_from_checkpoint",
    "project",
    "use_cpu",
    "dry_run",
}


def resolved_settings(*arguments: Any) -> dict[str, Any]:
    """Every key of the given dataclasses with the value it ended up with, as plain YAML values."""
    settings = {}
    for argument in arguments:
        for field in fields(argument):
            if field.init:
                settings[field.name] = _plain(getattr(argument, field.name))
    return settings


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds a run of another objective, model or dataset, or another model.

    Raises `UserError` naming the first key that differs.
    """
    resolved = folder / RESOLVED_FILE
    if not resolved.exists():
        if any(folder.glob("checkpoint-*")) or (folder / "config.json").exists():
            raise UserError(f"{folder} holds a model that is not a run of oprd: choose another output_dir")
        return
    stored = _stored_settings(resolved)
    for key in sorted(stored.keys() | settings.keys()):
        execution = key in EXECUTION_KEYS or key.startswith(EXECUTION_PREFIXES)
        if not execution and stored.get(key) != settings.get(key):
            raise UserError(
                f"{folder} holds a run with {key}: {stored.get(key)}, not {settings.get(key)}: choose "
                "another output_dir, or delete that folder to start over"
            )


def _stored_settings(resolved: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(resolved.read_text())["settings"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{resolved} is damaged: choose another output_dir, or delete that folder") from error


def write_resolved(folder: Path, settings: dict[str, Any]) -> None:
    """Write `resolved.yaml`: settings, package versions, Python, git commit."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "versions": _versions(), "git_commit": _git_commit()}
    (folder / RESOLVED_FILE).write_text(yaml.safe_dump(record, sort_keys=True, allow_unicode=True))


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest `checkpoint-*` that was written to its end: its trainer state comes last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{STATE_FILE}") if _state(path) is not None]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def is_finished(folder: Path, max_steps: int) -> bool:
    """Whether the final model lies in `folder` and was trained for `max_steps` or more."""
    state = _state(folder / STATE_FILE)
    return state is not None and state["global_step"] >= max_steps


def _state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if type(value) in (str, int, float, bool, type(None)) else str(value)


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
