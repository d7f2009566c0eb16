"""Where a run starts: from a checkpoint, or over again, and what then becomes of what was there."""

import logging
from pathlib import Path

from transformers import TrainerState

from oprd.folders.checkpoints import checkpoints
from oprd.folders.recorder import METRICS_FILE, read_metrics
from oprd.folders.run_folder import STATE_FILE
from oprd.folders.whole import SEAL_FILE

logger = logging.getLogger(__name__)

WRITTEN_LAST = (STATE_FILE, SEAL_FILE)


def tell_schedule(checkpoint: Path | None, max_steps: int) -> None:
    """Say so if the learning rates of a resumed run follow the schedule of another length from now on."""
    if checkpoint is None:
        return
    planned = TrainerState.load_from_json(str(checkpoint / STATE_FILE)).max_steps
    if planned != max_steps:
        logger.warning(
            "from step %d on the learning rate is that of a run of %d steps; so far it was that of %d",
            _step(checkpoint) + 1,
            max_steps,
            planned,
        )


def set_aside(folder: Path) -> None:
    """Move what a run left that starts over into a folder `earlier-1`, `earlier-2`, …, and say so.

    That is its metrics, and checkpoints that cannot be resumed from, but for
    those that were never written to their end.
    """
    steps = len(read_metrics(folder / METRICS_FILE))
    left = [path for path in checkpoints(folder) if any((path / name).exists() for name in WRITTEN_LAST)]
    left += [folder / METRICS_FILE] if steps else []
    if not left:
        return
    numbers = {path.name for path in folder.glob("earlier-*")}
    kept = next(folder / f"earlier-{n}" for n in range(1, len(numbers) + 2) if f"earlier-{n}" not in numbers)
    kept.mkdir()
    for path in left:
        path.rename(kept / path.name)
    logger.warning(
        "%s starts over, without a whole checkpoint: what its %d steps left is kept in %s",
        folder,
        steps,
        kept,
    )


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
