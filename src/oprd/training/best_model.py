"""The model with the most right answers, kept beside the checkpoints of a run."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from oprd.folders.checkpoints import written_whole
from oprd.folders.claims import BEST_FOLDER
from oprd.folders.saving import ResumableTrainer
from oprd.folders.whole import SEAL_FILE, damage
from oprd.training.collapse import ACCURACY

logger = logging.getLogger(__name__)

BEST_FILE = "best.json"


class BestModel:
    """Writes the student to `best` whenever more problems are answered right than ever before.

    The folder is whole or not there. A tie keeps the earlier model.
    """

    def __init__(self, trainer: ResumableTrainer, folder: Path) -> None:
        self._trainer, self.folder = trainer, folder / BEST_FOLDER
        self._accuracy = -1.0

    def resume(self, records: Sequence[Mapping[str, float]]) -> None:
        """Take up the best accuracy so far, unless its model is not there or of a step to come."""
        measured = {int(record["step"]): record[ACCURACY] for record in records if ACCURACY in record}
        if damage(self.folder) is None:
            step = json.loads((self.folder / BEST_FILE).read_text(encoding="utf-8"))["step"]
            self._accuracy = measured.get(step, -1.0)

    def observe(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Write the model of a step that is better than all before it."""
        if values.get(ACCURACY, -1.0) > self._accuracy:
            self._accuracy = values[ACCURACY]
            is_writer, wait = self._trainer.args.should_save, self._trainer.accelerator.wait_for_everyone
            with written_whole(self.folder, is_writer=is_writer, wait=wait):
                self._trainer.save_model(str(self.folder), _internal_call=True)
                if is_writer:
                    found = {"step": step, "accuracy": self._accuracy}
                    (self.folder / BEST_FILE).write_text(json.dumps(found) + "\n", encoding="utf-8")
        return {}


def best_model(folder: Path) -> Path | None:
    """The folder of a run's best model; None, with a warning, where there is none that is whole."""
    best = folder / BEST_FOLDER
    if (fault := damage(best)) is None:
        return best
    logger.warning("load_best: %s is not whole (%s), so the run ends with its last model", best, fault)
    return None


def copy_model(best: Path, target: Path) -> None:
    """Copy the model in `best` to `target`, without what belongs to the folder alone."""
    shutil.copytree(best, target, ignore=shutil.ignore_patterns(BEST_FILE, SEAL_FILE), dirs_exist_ok=True)
