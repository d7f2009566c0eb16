"""The keys of a training run: TRL's, transformers' and ours, with the paper's defaults."""

from dataclasses import dataclass, field

import torch
from trl import DistillationConfig

from oprd.foundation.errors import UserError
from oprd.foundation.ranges import check_ranges
from oprd.objective.settings import ObjectiveSettings, check_dtype, mapping
from oprd.rollouts.engines.importance import check_correction

# TRL 1.16 and recipes use the names of old, of which transformers 5.23 warns.
CHECKPOINTING_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
DEFAULT_STEPS = 500
AS_EPOCHS_SAY = -1  # transformers' word for steps that follow from num_train_epochs
MAPPINGS = (
    "model_init_kwargs",
    "teacher_model_init_kwargs",
    "generation_kwargs",
    "chat_template_kwargs",
    "teacher_chat_template_kwargs",
    "lr_scheduler_kwargs",
)


@dataclass
class OPRDConfig(ObjectiveSettings, DistillationConfig):
    """TRL's `DistillationConfig` with the keys of `ObjectiveSettings`; defaults are the paper's.

    Batch sizes count completions, as in TRL's GRPO: prompts per step = completions / num_generations.
    `temperature`, `top_p`, `top_k` and `min_p` are for sampling alone. Raises `UserError`.
    """

    # What transformers reads as a mapping from the command line; until it tells that by a field's type.
    _VALID_DICT_FIELDS = [  # noqa: RUF012 - as the base class has it
        *DistillationConfig._VALID_DICT_FIELDS,
        "teacher_chat_template_kwargs",
    ]

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher: a Hub name, a folder or tiny:teacher. (required)"}
    )
    temperature: float = field(default=1.0, metadata={"help": "For sampling rollouts; losses do not use it."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: steps, or a share if below 1."})
    max_steps: int = field(
        default=AS_EPOCHS_SAY,
        metadata={"help": f"Optimiser steps; {DEFAULT_STEPS}, or as many as num_train_epochs takes."},
    )
    num_train_epochs: float = field(
        default=0.0, metadata={"help": "Epochs over the prompts, in place of max_steps."}
    )
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Rollouts per micro-batch."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches per step."})
    max_completion_length: int | None = field(default=16384, metadata={"help": "Longest response (tokens)."})
    logging_steps: float = field(default=1, metadata={"help": "Log to the trackers every n steps."})
    # Ours ends the run; transformers' would wait for the device at every micro-batch.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})
    save_steps: float = field(
        default=50, metadata={"help": "Write a checkpoint every n steps; below 1, a share of the run."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Keep the newest n checkpoints; 0 keeps all."}
    )

    def __post_init__(self) -> None:
        if self.beta != 1.0:
            raise UserError(
                "beta is TRL's name for the divergence; use divergence: reverse_kl, forward_kl or jsd"
            )
        if self.output_dir == "":
            raise UserError("output_dir is empty: name a folder")
        if self.ignore_data_skip:
            raise UserError(
                "ignore_data_skip: a resumed run would draw the first prompts again: leave it out"
            )
        self.check()
        asked = str(self.fsdp).lower()
        if asked in ("true", "false"):  # the base class takes text for the options that it once was
            self.fsdp = asked == "true"  # type: ignore[assignment]  # which its annotation lacks
        self._choose_length()
        unread = ("pad_to_multiple_of", "max_steps" if self.max_steps == AS_EPOCHS_SAY else "")
        check_ranges({name: value for name, value in vars(self).items() if name not in unread})
        for name in MAPPINGS:
            setattr(self, name, mapping(name, getattr(self, name)) or None)
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            check_dtype(name, getattr(self, name))
        check_ranges(mapping("generation_kwargs", self.generation_kwargs), within="generation_kwargs: ")
        if self.vllm_importance_sampling_correction:
            check_correction(self)
        # Without it, transformers refuses bf16 on a machine that has no accelerator.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        for old, new in CHECKPOINTING_NAMES.items():
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        super().__post_init__()
        check_ranges({"pad_to_multiple_of": self.pad_to_multiple_of})  # a word until the base class reads it

    def _choose_length(self) -> None:
        """`max_steps`, or `num_train_epochs`, or the default; raises `UserError` for both."""
        if self.max_steps != AS_EPOCHS_SAY and self.num_train_epochs:
            raise UserError(
                f"max_steps: {self.max_steps} and num_train_epochs: {self.num_train_epochs:g} both say how "
                "long the run is: leave one of them out"
            )
        if self.max_steps == AS_EPOCHS_SAY and not self.num_train_epochs:
            self.max_steps = DEFAULT_STEPS
