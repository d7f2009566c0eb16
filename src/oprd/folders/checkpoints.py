"""The checkpoints of a run folder: which one to resume from, how they are written, which may go."""

import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState

from oprd.folders.claims import steps_done
from oprd.folders.lock import check_held
from oprd.folders.run_folder import STATE_FILE
from oprd.folders.whole import SEAL_FILE, damage, seal, unseal
from oprd.foundation.errors import Fault
from oprd.foundation.meters import MB

logger = logging.getLogger(__name__)

TORCH_CANNOT_WRITE = (
    "inline_container",
    "iostream error",
)  # the file of its writer, and the C++ stream's words


def checkpoints(folder: Path) -> list[Path]:
    """The folders `checkpoint-<step>`, whole or not, newest first."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    found = {int(step[1]): path for path, step in steps.items() if step and path.is_dir()}
    return [found[step] for step in sorted(found, reverse=True)]


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole and unchanged; logs the ones that are skipped."""
    passed_over = checkpoints(folder)
    for checkpoint in passed_over:
        fault = damage(checkpoint) or _other_step(checkpoint)
        if fault is None:
            return checkpoint
        if _is_model_only(checkpoint):
            fault = "it was saved with save_only_model, without the optimiser, and cannot be resumed from"
        logger.warning("%s is passed over: %s", checkpoint, fault)
    if passed_over:
        logger.warning("%s holds no whole checkpoint: the run starts over", folder)
    return None


def _other_step(checkpoint: Path) -> str | None:
    """What is wrong with the file that holds a checkpoint's step; older seals have no checksum of it."""
    step = steps_done(checkpoint)
    if step is None or not _is_state(checkpoint / STATE_FILE):
        return f"{STATE_FILE} cannot be read"
    return None if checkpoint.name == f"checkpoint-{step}" else f"{STATE_FILE} is of step {step}"


def _is_state(file: Path) -> bool:
    """Whether a run can take up the state in a file."""
    try:
        state = TrainerState.load_from_json(str(file))
        return math.isfinite(state.epoch or 0) and type(state.max_steps) is int
    except Exception:  # whatever else is made of such a text
        return False


def _is_model_only(checkpoint: Path) -> bool:
    """Whether the last file was written, and nothing of what a run needs besides the model."""
    has_seal, has_state = ((checkpoint / name).exists() for name in (SEAL_FILE, STATE_FILE))
    return has_state and not has_seal and not any(checkpoint.glob("rng_state*"))


@contextmanager
def written_whole(folder: Path, *, is_writer: bool, wait: Callable[[], None]) -> Iterator[None]:
    """Wraps the code by which all ranks write `folder`: old files go first, the seal is written last.

    `is_writer`: whether this rank seals it; `wait` returns when every rank has called it. A fault of the disk
    becomes a `Fault` that names the folder, of which nothing is left; other errors pass, and what they
    leave is not sealed.
    """
    if is_writer:
        check_held(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
    wait()
    try:
        yield
        wait()
        if is_writer:
            seal(folder, [path for path in folder.rglob("*") if path.is_file()])
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_the_disk(error):
            raise
        free = shutil.disk_usage(folder.parent).free / MB
        shutil.rmtree(folder, ignore_errors=True)
        raise Fault(
            f"{folder} could not be written, with {free:.0f} MB free on its disk ({error}): fix that, and "
            "the same command resumes"
        ) from error


def _is_of_the_disk(error: Exception) -> bool:
    if isinstance(error, OSError):  # which those of the network are too
        return error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, SafetensorError) or any(words in str(error) for words in TORCH_CANNOT_WRITE)


def rotate(folder: Path, keep: int | None, best: str | None = None) -> None:
    """Delete every checkpoint but the `keep` newest whole ones and `best`; without `keep`, none."""
    if not keep or keep < 0:
        return
    whole = [path for path in checkpoints(folder) if damage(path, by_size=True) is None]
    kept = {path.resolve() for path in whole[:keep]} | ({Path(best).resolve()} if best else set())
    for path in checkpoints(folder):
        if path.resolve() not in kept:
            shutil.rmtree(path, ignore_errors=True)


def publish(partial: Path, folder: Path) -> None:
    """Move the files of `partial` to `folder`, where they alone are sealed: others may come and go."""
    unseal(partial)
    unseal(folder)
    moved = []
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        target = folder / path.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        moved.append(path.replace(target))
    seal(folder, moved)
    shutil.rmtree(partial)
