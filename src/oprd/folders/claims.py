"""What a command may write over: nothing that another one left, and no finished model."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oprd.folders.run_folder import (
    BATCH_KEYS,
    RESOLVED_FILE,
    STATE_FILE,
    Inputs,
    Record,
    check_folder,
    holds_results,
)
from oprd.folders.whole import MISSING, SEAL_FILE, UnreadableSeal, check_place, faults
from oprd.foundation.errors import UserError

logger = logging.getLogger(__name__)

PARTIAL = "final.partial"  # where a final model is written before it is moved to the root
BEST_FOLDER = "best"  # of the model with the best accuracy
CARD_FILE = "README.md"
WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_*", "*.gguf")
OF_A_MODEL = (*WEIGHTS, "config.json", "generation_config.json", "tokenizer*", "chat_template*", CARD_FILE)
OF_A_RUN = ("checkpoint-*", "metrics.jsonl", STATE_FILE, SEAL_FILE)
OF_A_BRIDGE = ("bridge.safetensors", "report.json")
OF_AN_EVALUATION = ("settings.json", "samples.jsonl", "summary.json")

FILES = (
    *(RESOLVED_FILE, STATE_FILE, SEAL_FILE, CARD_FILE, "metrics.jsonl", "model.safetensors", "config.json"),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", *OF_A_BRIDGE, *OF_AN_EVALUATION),
    "*.tmp",
)
FOLDERS = ("checkpoint-[0-9]*", BEST_FOLDER, PARTIAL)


def check_kinds(folder: Path) -> None:
    """Raise `UserError` for a folder, a pipe or the like in the place of a file, and the other way round."""
    check_place(folder)
    for patterns, kind, others in (
        (FILES, "file", (Path.is_dir, Path.is_fifo)),
        (FOLDERS, "folder", (Path.is_file, Path.is_fifo)),
    ):
        for path in (path for pattern in patterns for path in folder.glob(pattern)):
            if any(is_other(path) for is_other in others):
                raise UserError(f"{path} is no {kind}, and one of that name is written there: move it away")


def check_foreign(folder: Path, mark: str, others: Sequence[str]) -> None:
    """Raise `UserError` if `folder` is another command's, or somebody else's.

    `mark` is the file by which the command knows a folder of its own. A folder without it may hold nothing
    that any command writes; one with it, none of `others`, which another command leaves beside such a file.
    """
    check_kinds(folder)
    is_ours = (folder / mark).exists()
    for pattern in others if is_ours else (*OF_A_MODEL, *OF_A_RUN, *OF_A_BRIDGE, *OF_AN_EVALUATION):
        for path in sorted(folder.glob(pattern)):
            raise UserError(
                f"{folder} holds {path.name}, which is not of this command: choose another output_dir"
            )


def is_done(
    folder: Path, settings: dict[str, Any], inputs: Inputs, defaults: dict[str, Any] | None = None
) -> bool:
    """Whether the run of these resolved settings is finished; raises `UserError` for another's folder."""
    check_foreign(folder, RESOLVED_FILE, OF_A_BRIDGE)
    check_folder(folder, settings, inputs, defaults)
    steps = settings["max_steps"]
    if steps < 1 and (folder / RESOLVED_FILE).exists() and holds_results(folder):
        steps = _steps_of_epochs(folder, settings)
    return steps > 0 and is_finished(folder, steps)


def _steps_of_epochs(folder: Path, settings: dict[str, Any]) -> int:
    """How many steps `num_train_epochs` are, which a run of the same prompts has written down, or -1."""
    stored = Record.read(folder / RESOLVED_FILE).settings
    keys, steps = ("num_train_epochs", *BATCH_KEYS), stored.get("max_steps")
    is_same = all(stored.get(key) == settings.get(key) for key in keys)
    return steps if is_same and isinstance(steps, int) else -1


def is_finished(folder: Path, max_steps: int) -> bool:
    """Whether the final model lies in `folder` as it was written, after `max_steps` steps or more."""
    steps = steps_done(folder)
    if steps is None or steps < max_steps:
        return False
    try:
        return not _changes(folder)
    except UnreadableSeal:
        return False


def steps_done(folder: Path) -> int | None:
    """After how many steps the model in `folder` was written; None where no file says so."""
    try:
        steps = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return steps if isinstance(steps, int) else None


def _changes(folder: Path) -> list[tuple[str, str]]:
    """What differs from the finished model, except its card, which anyone may edit."""
    return [fault for fault in faults(folder) if Path(fault[0]).name != CARD_FILE]


def check_final(folder: Path, checkpoint: Path | None) -> None:
    """Raise `UserError` if a run from `checkpoint`, or from the start, would overwrite a model.

    That is a finished model that somebody has changed, or one that would be trained anew, because the
    checkpoint of its last step is gone. What is only missing from it is written again.
    """
    try:
        changes = _changes(folder)
    except UnreadableSeal:
        _check_unsealed(folder, checkpoint)
        return
    steps = steps_done(folder)
    goes_on = checkpoint is not None and (steps or 0) <= (steps_done(checkpoint) or 0)
    for name, why in changes:
        if why != MISSING:
            raise UserError(
                f"{folder} is finished, and {name} {why}: it is not written over; choose another output_dir, "
                + (f"or delete {name} to have it written again" if goes_on else "or move that folder away")
            )
    if not goes_on:
        what = f"but for {changes[0][0]}" if changes else f"after {steps} steps"
        raise UserError(
            f"{folder} is finished, {what}, and the checkpoint of its last step is gone: start another run "
            f"from it (model_name_or_path: {folder}, another output_dir), or move it away to start over"
        )
    for name, _ in changes:
        logger.warning("%s/%s is missing: the final model is written again", folder, name)


def _check_unsealed(folder: Path, checkpoint: Path | None) -> None:
    """Raise `UserError` for weights that no seal lists, unless a run has begun to move them there."""
    if checkpoint is not None or (folder / PARTIAL).exists():
        return
    for path in (path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))):
        raise UserError(
            f"{folder} holds {path.name} and no whole checkpoint to go on from, and a run would write over "
            "it: choose another output_dir, or move that model away"
        )
