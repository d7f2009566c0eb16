"""A training run as a folder: what may be resumed, what is refused, and what a finished run leaves.

The folder holds the final model, `checkpoint-*`, `metrics.jsonl` and `resolved.yaml`.
"""

import importlib.metadata
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from oprd.errors import UserError
from oprd.folder.whole import write_whole

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
    "ddp_",
    "fsdp",
    "gradient_checkpointing",
    "activation_checkpointing",
    "vllm_server",
    "vllm_gpu",
    "vllm_group",
    "vllm_enable_sleep",
    "vllm_tensor",
)
EXECUTION_KEYS = {
    "output_dir",
    "max_steps",
    "run_name",
    "disable_tqdm",
    "resume_from_checkpoint",
    "project",
    "use_cpu",
    "num_processes",
    "deepspeed",
    "teacher_offload",
    "padding_free",
    "keep_attention",
    "vllm_mode",
    "output_chunk_size",
    "max_tokens_per_micro_batch",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dry_run",
}
# Their product is what a step computes.
BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")


def resolved_settings(*arguments: Any) -> dict[str, Any]:
    """Every key of the given dataclasses with the value it ended up with, as plain YAML values."""
    settings = {}
    for argument in arguments:
        for field in fields(argument):
            if field.init:
                settings[field.name] = _plain(getattr(argument, field.name))
    return settings


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds a run of another objective, model or dataset.

    Raises `UserError` naming the first key that differs.
    """
    resolved = folder / RESOLVED_FILE
    if not resolved.exists():
        return
    stored = _stored_settings(resolved)
    for key in sorted(stored.keys() | settings.keys()):
        execution = key in EXECUTION_KEYS or key.startswith(EXECUTION_PREFIXES)
        if not execution and stored.get(key) != settings.get(key):
            raise UserError(
                f"{folder} holds a run with {key}: {stored.get(key)}, not {settings.get(key)}: choose "
                "another output_dir, or delete that folder to start over"
            )
    rollouts = [_rollouts_per_step(one) for one in (stored, settings)]
    if rollouts[0] != rollouts[1]:
        raise UserError(
            f"{folder} holds a run of {rollouts[0]} rollouts per step, and this would be {rollouts[1]}: keep "
            "per_device_train_batch_size × gradient_accumulation_steps × processes as it was"
        )


def _rollouts_per_step(settings: dict[str, Any]) -> int:
    return math.prod(settings.get(key, 1) for key in BATCH_KEYS)


def _stored_settings(resolved: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(resolved.read_text(encoding="utf-8"))["settings"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{resolved} is damaged: choose another output_dir, or delete that folder") from error


def write_resolved(folder: Path, settings: dict[str, Any]) -> None:
    """Write `resolved.yaml`: settings, package versions, Python, git commit."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "versions": _versions(), "git_commit": _git_commit()}
    write_whole(folder / RESOLVED_FILE, yaml.safe_dump(record, sort_keys=True, allow_unicode=True))


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
