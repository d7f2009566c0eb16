"""`oprd train`: a recipe becomes a run folder; the same command on the same folder resumes."""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from oprd.errors import UserError
from oprd.evaluation.run import EvalSettings, evaluate
from oprd.prompts import load_prompts
from oprd.recipe import parse_recipe
from oprd.rollouts import Sampling
from oprd.run import check_folder, is_finished, last_whole_checkpoint, resolved_settings, write_resolved
from oprd.trainer import OPRDConfig, OPRDTrainer

logger = logging.getLogger(__name__)


@dataclass
class RunArguments:
    """The models' and the dataset's names, under TRL's keys."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Student: a Hub name, a folder or tiny:student."}
    )
    dataset_name: str = field(
        default="",
        metadata={"help": "Prompts: a Hub name, a folder, a parquet, jsonl or json file, or tiny."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    accuracy_dataset_name: str | None = field(
        default=None, metadata={"help": "Problems with answers, to follow accuracy during the run."}
    )
    accuracy_steps: int = field(default=50, metadata={"help": "Measure accuracy every n steps."})
    accuracy_problems: int = field(default=64, metadata={"help": "How many problems, from the first on."})
    accuracy_samples: int = field(default=4, metadata={"help": "Samples per problem."})
    dry_run: bool = field(
        default=False, metadata={"help": "Try an update of the longest rollouts, report its memory and stop."}
    )


def parse_training_recipe(path: str | Path, flags: Sequence[str] = ()) -> tuple[RunArguments, OPRDConfig]:
    """Read and validate a training recipe; raises `UserError`."""
    try:
        run, config = parse_recipe(path, flags, (RunArguments, OPRDConfig))
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{path}: {error}") from error
    for key in ("model_name_or_path", "dataset_name"):
        if not getattr(run, key):
            raise UserError(f"{path} names no {key}: add it to the recipe or as a flag")
    return run, config


def train(
    run: RunArguments,
    config: OPRDConfig,
    label: str = "distil",
) -> Path:
    """Start, resume or leave alone the run in `config.output_dir`; returns the folder.

    Raises `UserError` for what the user can mend, before anything is written.
    """
    folder = Path(config.output_dir)
    settings = resolved_settings(config, run)
    check_folder(folder, settings)
    if is_finished(folder, config.max_steps):
        logger.warning("%s is finished: nothing to do", folder)
        return folder
    trainer = _make_trainer(run, config, label)
    if trainer.is_world_process_zero():
        write_resolved(folder, settings)
    checkpoint = last_whole_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    trainer.create_model_card(model_name=folder.name, dataset_name=run.dataset_name)
    trainer.save_state()
    return folder


def _make_trainer(run: RunArguments, config: OPRDConfig, label: str) -> OPRDTrainer:
    folder = Path(config.output_dir)
    is_new = not folder.exists()
    try:
        prompts = load_prompts(run.dataset_name, run.dataset_train_split, run.dataset_config)
        trainer = OPRDTrainer(
            model=run.model_name_or_path,
            teacher_model=config.teacher_model_name_or_path,
            args=config,
            train_dataset=prompts,
        )
        trainer.recorder.label = label
        if run.accuracy_dataset_name:
            trainer.recorder.observers.append(_accuracy_observer(run, config, trainer))
    except (ValueError, ImportError) as error:
        if is_new:  # the base class makes it before everything is checked
            shutil.rmtree(folder, ignore_errors=True)
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    return trainer


def _accuracy_observer(
    run: RunArguments, config: OPRDConfig, trainer: OPRDTrainer
) -> Callable[[int, dict[str, float]], dict[str, float]]:
    """Measures accuracy every `accuracy_steps` steps, without touching the run's random state."""
    assert run.accuracy_dataset_name is not None
    rows = load_prompts(run.accuracy_dataset_name, "test")
    rows = rows.select(range(min(run.accuracy_problems, len(rows))))
    sampling = Sampling(max_new_tokens=config.max_completion_length or 512)
    settings = EvalSettings(
        samples=run.accuracy_samples,
        sampling=sampling,
        batch_size=256,
        chat_template_kwargs=config.chat_template_kwargs,
    )

    def observe(step: int, _: dict[str, float]) -> dict[str, float]:
        if step % run.accuracy_steps:
            return {}
        model = trainer.accelerator.unwrap_model(trainer.model)
        summary = evaluate(model, trainer.processing_class, rows, settings, progress=False)
        return {f"eval/{key}": summary[key] for key in ("avg_at_k", "best_at_k", "mean_length")}

    return observe
