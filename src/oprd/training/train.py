"""`oprd train`: a recipe becomes a run folder; the same command on the same folder resumes."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel

from oprd.bridge.artifact import bridge_file
from oprd.folders.checkpoints import last_whole_checkpoint, publish, written_whole
from oprd.folders.claims import CARD_FILE, PARTIAL, check_final, is_done, is_finished
from oprd.folders.fingerprint import file_fingerprint, model_fingerprints, rows_fingerprint
from oprd.folders.lock import hold
from oprd.folders.recorder import METRICS_FILE, read_metrics
from oprd.folders.run_folder import (
    STATE_FILE,
    Inputs,
    default_settings,
    output_folder,
    resolved_settings,
    write_resolved,
)
from oprd.folders.starting import set_aside, tell_schedule
from oprd.folders.stopping import standing
from oprd.foundation.errors import UserError, refusals_told
from oprd.foundation.foreign.transformers import loaded_whole
from oprd.foundation.ranges import check_ranges
from oprd.foundation.recipe import parse_recipe
from oprd.foundation.signals import Stopped, signals_handled
from oprd.models.adapters import MERGED_FOLDER, note_commit, save_merged
from oprd.models.init_kwargs import hub_kwargs, reference_kwargs, student_kwargs, teacher_kwargs
from oprd.models.loading import holds_adapters
from oprd.rollouts.intake import stream_length
from oprd.rollouts.prompts import load_prompts
from oprd.training.accuracy import watched
from oprd.training.best_model import best_model, copy_model
from oprd.training.config import OPRDConfig
from oprd.training.run_arguments import RunArguments
from oprd.training.trainer import OPRDTrainer
from oprd.training.watch import Watch

logger = logging.getLogger(__name__)


def parse_training_recipe(
    path: str | Path | None, flags: Sequence[str] = ()
) -> tuple[RunArguments, OPRDConfig]:
    """Read and validate a training recipe, or flags alone; raises `UserError`."""
    told = path or "the command line"
    try:
        run, config = parse_recipe(path, flags, (RunArguments, OPRDConfig))
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"{told}: {error}") from error
    names = {
        "model_name_or_path": run.model_name_or_path,
        "teacher_model_name_or_path": config.teacher_model_name_or_path,
        "dataset_name": run.dataset_name,
    }
    for key, name in names.items():
        if not name:
            raise UserError(f"{told} names no {key}: add it to the recipe or as a flag")
    check_ranges(vars(run))
    run.check()
    if config.resume_from_checkpoint is not None:
        raise UserError(
            f"{told}: resume_from_checkpoint: the same command resumes from the last complete checkpoint in "
            "output_dir: leave it out"
        )
    return run, config


def train(
    run: RunArguments,
    config: OPRDConfig,
    label: str = "distil",
) -> Path:
    """Start, resume or leave alone the run in `config.output_dir`; returns the folder.

    Raises `UserError` for what the user can fix, before anything is written, and `Stopped` if a signal ended
    the run before its last step.
    """
    folder = output_folder(config)
    settings = resolved_settings(config, run) | {"num_processes": config.world_size}
    prompts = prompts_of(run, config)
    known = settings, run_inputs(run, config, prompts), default_settings(config, run)
    if is_done(folder, *known):
        logger.warning("%s is finished: nothing to do", folder)
        return folder
    with hold(folder, "oprd train", config.process_index == 0, _as_the_first_rank):
        if not is_done(folder, *known):  # by a process that has just let go of it
            _train(run, config, prompts, label, *known[:2])
    return folder


def _train(
    run: RunArguments,
    config: OPRDConfig,
    prompts: Dataset,
    label: str,
    settings: dict[str, Any],
    inputs: Inputs,
) -> None:
    folder = output_folder(config)
    checkpoint = last_whole_checkpoint(folder) if config.process_index == 0 else None
    checkpoint = _as_the_first_rank(checkpoint)  # ranks may see a shared file system at different times
    check_final(folder, checkpoint)
    read_metrics(folder / METRICS_FILE)  # which a resumed run goes on with
    trainer = _make_trainer(run, config, prompts, label)
    if is_finished(folder, config.max_steps):  # which for epochs is known by now
        logger.warning("%s is finished: nothing to do", folder)
        return
    watches = watched(run, config, trainer)
    tell_schedule(checkpoint, config.max_steps)
    if trainer.is_world_process_zero():
        if checkpoint is None:
            set_aside(folder)
        settings = settings | {"max_steps": config.max_steps}
        write_resolved(folder, settings, inputs)
    trainer.resolved = settings
    with signals_handled(trainer.stopping.handle):
        try:
            _to_the_end(trainer, folder, run, watches, checkpoint)
        except Stopped as stop:
            raise Stopped(stop.number, standing(folder, config.max_steps), stop.by_all) from None


def _to_the_end(
    trainer: OPRDTrainer,
    folder: Path,
    run: RunArguments,
    watches: Sequence[Watch],
    checkpoint: Path | None,
) -> None:
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    told = trainer.stopping.agreed
    if told is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(told, by_all=True)
    for watch in watches if trainer.state.global_step < trainer.state.max_steps else ():
        watch.check()
    trainer.supervision.check()
    trainer.create_model_card(model_name=folder.name, dataset_name=run.dataset_name)
    _save_final(trainer, folder, best_model(folder) if run.load_best else None)


def _as_the_first_rank(value: Any) -> Any:
    """The `value` of the first rank, on every rank."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def prompts_of(run: RunArguments, config: OPRDConfig) -> Dataset:
    """The prompts that a run names; raises `UserError`."""
    streamed = rows_streamed(run, config, config.world_size)
    place = run.dataset_name, run.dataset_train_split, run.dataset_config
    return load_prompts(*place, config.drop_unrenderable_prompts, streamed, answers=False)


def run_inputs(run: RunArguments, config: OPRDConfig, prompts: Dataset) -> Inputs:
    """Fingerprints of what a run is made from, by the keys that name it; raises `UserError`."""
    student, teacher = student_kwargs(config), teacher_kwargs(config)
    inputs = {
        "model_name_or_path": model_fingerprints(run.model_name_or_path, **hub_kwargs(student)),
        "dataset_name": {"rows": rows_fingerprint(prompts)},
    }
    if config.teacher_model_name_or_path:
        name = config.teacher_model_name_or_path
        inputs["teacher_model_name_or_path"] = model_fingerprints(name, **hub_kwargs(teacher))
    if config.reference_model_name_or_path:
        name = config.reference_model_name_or_path
        inputs["reference_model_name_or_path"] = model_fingerprints(
            name, **hub_kwargs(reference_kwargs(config))
        )
    if config.bridge and bridge_file(config.bridge).is_file():
        inputs["bridge"] = {"file": file_fingerprint(bridge_file(config.bridge))}
    return inputs


def _save_final(trainer: OPRDTrainer, folder: Path, best: Path | None) -> None:
    """Put the final model, or `best`, at the root of `folder`: written aside, then moved there and sealed."""
    partial, is_writer = folder / PARTIAL, trainer.args.should_save
    with written_whole(partial, is_writer=is_writer, wait=trainer.accelerator.wait_for_everyone):
        if best is None:
            trainer.save_model(str(partial), _internal_call=True)
        elif is_writer:
            copy_model(best, partial)
        if is_writer:
            if holds_adapters(str(partial)):
                (partial / CARD_FILE).unlink(missing_ok=True)  # peft's, a form to be filled in
                with loaded_whole():
                    ends = trainer.eos_token_ids if trainer.ends else ()
                    save_merged(partial, trainer.processing_class, trainer.args.trust_remote_code, ends)
                shutil.copy(folder / CARD_FILE, partial / MERGED_FOLDER)
            trainer.state.save_to_json(str(partial / STATE_FILE))
    if is_writer:
        publish(partial, folder)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save")


def _make_trainer(run: RunArguments, config: OPRDConfig, prompts: Dataset, label: str) -> OPRDTrainer:
    with refusals_told():
        trainer = OPRDTrainer(
            model=run.model_name_or_path,
            teacher_model=config.teacher_model_name_or_path,
            args=config,
            train_dataset=prompts,
            peft_config=run.lora,
        )
        trainer.recorder.label = label
        if run.use_peft:
            assert isinstance(trainer.model, PeftModel)
            note_commit(trainer.model, student_kwargs(config).get("revision"))
    return trainer


def rows_streamed(run: RunArguments, config: OPRDConfig, ranks: int) -> int | None:
    """How many rows of a streamed dataset a run takes; None where it is not streamed."""
    return stream_length(config, ranks) if run.dataset_streaming else None
