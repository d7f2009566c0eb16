"""A trainer whose checkpoints are whole or not at all, and the same files for any number of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from oprd.folders.checkpoints import last_whole_checkpoint, rotate, written_whole
from oprd.folders.run_folder import output_folder
from oprd.folders.schedule import follow_schedule
from oprd.foundation.errors import UserError, is_out_of_memory
from oprd.models.finite import check_trained
from oprd.models.sharding.fsdp import Sharding
from oprd.models.sharding.state import (
    load_optimizer_state,
    load_weights,
    whole_optimizer_state,
    whole_weights,
)


@contextmanager
def loading(checkpoint: str, *names: str) -> Iterator[None]:
    """Inside it, a failure to load these files, which are whole, is a `UserError` that names them."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        files = [path.name for name in names for path in sorted(Path(checkpoint).glob(name))]
        why = f"{type(error).__name__}: {error}".partition(". ")[0]  # torch's advice on pickles misleads
        raise UserError(
            f"{checkpoint}: {' or '.join(files or names)} cannot be loaded ({why}); delete that checkpoint "
            "to go on from an older one"
        ) from error


class ResumableTrainer(Trainer):
    """`transformers.Trainer`, which writes file by file, and sharded models in a format of their own."""

    model: PreTrainedModel
    sharding: Sharding | None = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; `resume_from_checkpoint=True` is the last whole one of the output folder, or none.

        The base class takes the last one, whole or not; until it seals its checkpoints.
        """
        if resume_from_checkpoint is True:
            last = last_whole_checkpoint(output_folder(self.args))
            resume_from_checkpoint = str(last) if last else None
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Until the base class takes no further step after it has resumed from the checkpoint of the last."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model in one process's files, however many ranks hold it, if its weights are finite.

        Until the base class checks the weights, and saves those of FSDP2 without accelerate's own format.
        """
        check_trained(self.model, self.state.global_step)
        if self.sharding is None:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, state_dict=whole_weights(self.model, keep=self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """One process's files under FSDP too; until the base class has such for any number of ranks."""
        if self.sharding is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_optimizer_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Until the base class loads weights too that the files name differently from the model."""
        with loading(resume_from_checkpoint, "*.safetensors"):
            if self.sharding is None and isinstance(self.model, PeftModel):
                return super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.sharding is None or model is not None:  # a sharded model is asked for once it is sharded
                load_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Loads it like a checkpoint; until the base class does, which under FSDP wants another format."""
        if self.sharding is None and (isinstance(self.model, PeftModel) or self.is_deepspeed_enabled):
            return super()._load_best_model()
        load_weights(self.model, Path(str(self.state.best_model_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """See `_save_optimizer_and_scheduler`; until the base class names the files that cannot be loaded."""
        if checkpoint is None:
            return
        with loading(checkpoint, OPTIMIZER_NAME, SCHEDULER_NAME):
            if self.sharding is None:
                super()._load_optimizer_and_scheduler(checkpoint)
            else:
                load_optimizer_state(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
                schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
                assert self.lr_scheduler is not None
                self.lr_scheduler.load_state_dict(schedule)
        follow_schedule(self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Until the base class names the files that cannot be loaded."""
        with loading(checkpoint or "", "rng_state*"):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The base class's checkpoint, sealed when every rank has written; only then may older ones go.

        Until the base class writes checkpoints that are whole or not there.
        """
        if self.args.save_only_model:  # which nothing can resume from
            super()._save_checkpoint(model, trial)
            return
        folder, is_writer = Path(self._get_output_dir(trial)), self.args.should_save
        checkpoint, limit = folder / f"checkpoint-{self.state.global_step}", self.args.save_total_limit
        self.args.save_total_limit = None
        with written_whole(checkpoint, is_writer=is_writer, wait=self.accelerator.wait_for_everyone):
            super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        if is_writer:
            rotate(folder, limit, self.state.best_model_checkpoint)
