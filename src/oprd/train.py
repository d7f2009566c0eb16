"""`oprd train`: a recipe becomes a run folder; the same command on the same folder resumes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftConfig
from transformers import TrainerCallback

from oprd.errors import UserError
from oprd.prompts import load_prompts
from oprd.recipe import parse_recipe
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
    callbacks: Sequence[TrainerCallback] = (),
    peft_config: PeftConfig | None = None,
) -> Path:
    """Start, resume or leave alone the run in `config.output_dir`; returns the folder."""
    folder = Path(config.output_dir)
    settings = resolved_settings(config, run)
    check_folder(folder, settings)
    if is_finished(folder, config.max_steps):
        logger.warning("%s is finished: nothing to do", folder)
        return folder
    trainer = OPRDTrainer(
        model=run.model_name_or_path,
        teacher_model=config.teacher_model_name_or_path,
        args=config,
        train_dataset=load_prompts(run.dataset_name, run.dataset_train_split, run.dataset_config),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )
    write_resolved(folder, settings)
    checkpoint = last_whole_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    trainer.create_model_card(model_name=folder.name, dataset_name=run.dataset_name)
    trainer.save_state()
    return folder
