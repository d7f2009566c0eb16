"""OPRD on TRL: rollouts, buffering, checkpoints and distribution are TRL's, the update is ours.

The only module that imports trl.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DistillationConfig, DistillationTrainer
from trl.generation import vllm_generation
from trl.models import prepare_deepspeed
from trl.trainer.utils import RepeatSampler

from oprd.bridge.drift import DriftMonitor
from oprd.capture import blocks
from oprd.checkpointing import check_attention_kept
from oprd.engines.importance import check_correction
from oprd.engines.staleness import FixedText
from oprd.engines.student import StudentEngine
from oprd.engines.vllm import check_server, check_training, training_engines
from oprd.errors import UserError, whatever_fails_is
from oprd.folder.card import model_card
from oprd.folder.recorder import Recorder
from oprd.folder.run import resolved_settings, write_resolved
from oprd.folder.saving import ResumableTrainer
from oprd.folder.schedule import check_optimizer
from oprd.folder.stopping import Stopping
from oprd.folder.whole import write_whole
from oprd.freezing import apart_from
from oprd.init_kwargs import check_loaded_teacher, teacher_kwargs
from oprd.installed import check_installed
from oprd.intake import look_ahead, settle_steps, stream_length
from oprd.meters import MemoryMeter
from oprd.model_checks import check_tokenizer
from oprd.origin import warn_of_another_origin
from oprd.padding import heeds_padding
from oprd.precision import Precision
from oprd.ranges import check_ranges
from oprd.rollouts import eos_token_ids
from oprd.settings import ObjectiveSettings, check_dtype, mapping
from oprd.sharding.fsdp import Sharding
from oprd.sharding.zero import check_zero3
from oprd.start_line import start_line
from oprd.student_model import load_student, taken_as_loaded
from oprd.supervision import SupervisionWatch
from oprd.teacher import Teacher, quantization
from oprd.translation import Translation
from oprd.trial import told_of_architecture, try_rollout, try_states
from oprd.update import Update
from oprd.update_trainer import UpdateTrainer

logger = logging.getLogger(__name__)

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


class EpochSampler(RepeatSampler):
    """TRL's sampler, whose order in an epoch depends on nothing but the seed and the epoch.

    TRL's own order follows from the epochs before it, which a resumed run has not been through.
    """

    def __init__(self, epoch: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


@dataclass
class OPRDConfig(ObjectiveSettings, DistillationConfig):
    """TRL's `DistillationConfig` with the keys of `ObjectiveSettings`; defaults are the paper's.

    Batch sizes count completions, as in TRL's GRPO: prompts per step = completions / num_generations.
    `temperature`, `top_p`, `top_k` and `min_p` are for sampling alone. Raises `UserError`.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *DistillationConfig._VALID_DICT_FIELDS,
        "teacher_chat_template_kwargs",
    ]

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher: a Hub name, a folder or tiny:teacher. (required)"}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of sampling rollouts, not of any loss."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: steps, or a share if below 1."})
    max_steps: int = field(
        default=AS_EPOCHS_SAY,
        metadata={"help": f"Optimiser steps; {DEFAULT_STEPS}, or as many as num_train_epochs takes."},
    )
    num_train_epochs: float = field(
        default=0.0, metadata={"help": "Passes over the prompts, in place of max_steps."}
    )
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Rollouts per micro-batch."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches per step."})
    max_completion_length: int | None = field(default=16384, metadata={"help": "Longest rollout, in tokens."})
    logging_steps: float = field(default=1, metadata={"help": "Log to the trackers every n steps."})
    # Ours ends the run; transformers' would wait for the device at every micro-batch.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})
    save_steps: float = field(
        default=50, metadata={"help": "Write a checkpoint every n steps, or so large a share of the run."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Keep the newest so many checkpoints; 0 keeps all."}
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
        asked = str(getattr(self, "fsdp")).lower()  # noqa: B009 - mypy cannot tell its type
        if asked in ("true", "false"):  # the base class takes text for the options that it once was
            self.fsdp = asked == "true"
        self._choose_length()
        unread = ("pad_to_multiple_of", "max_steps" if self.max_steps == AS_EPOCHS_SAY else "")
        check_ranges({name: value for name, value in vars(self).items() if name not in unread})
        for name in MAPPINGS:
            setattr(self, name, mapping(name, getattr(self, name)) or None)
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            check_dtype(name, getattr(self, name))
        check_ranges(self.generation_kwargs or {}, within="generation_kwargs: ")
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


class OPRDTrainer(ResumableTrainer, UpdateTrainer, DistillationTrainer):
    """On-policy distillation in representation space, output space, or both (Eq. 6–7).

    `model` and `teacher_model` are names (`tiny:student`, a folder, a Hub name) or model objects;
    other arguments are those of `trl.DistillationTrainer`. Of a stream (`IterableDataset`) the prompts of
    `max_steps` steps are read into memory. Raises `UserError` for anything the user can mend, before the
    first rollout: every prompt is rendered in every template that will read it.
    """

    _tag_names = ("trl", "oprd")
    _name = "OPRD"
    vllm_generation: Any
    resolved: dict[str, Any] | None = None  # the settings that a command has written to the run's folder

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: OPRDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or OPRDConfig()
        if args.use_vllm:
            check_training(args.vllm_mode, args.vllm_enable_sleep_mode)
        teacher_model = teacher_model or args.teacher_model_name_or_path
        self._names = {"student": _name(model), "teacher": _name(teacher_model)}
        if teacher_model is None:
            raise UserError("no teacher: set teacher_model_name_or_path to a name, a folder or tiny:teacher")
        if isinstance(train_dataset, IterableDataset):
            train_dataset = look_ahead(train_dataset, stream_length(args, args.world_size))
        if not isinstance(train_dataset, Dataset):
            raise UserError(f"train_dataset must be a datasets.Dataset, got {type(train_dataset).__name__}")
        if args.eval_on_start and kwargs.get("eval_dataset") is None:
            raise UserError("eval_on_start takes an eval_dataset: leave it out, or set accuracy_dataset_name")
        check_installed(args)
        if not isinstance(teacher_model, str):
            check_loaded_teacher(args)
        teacher_model = apart_from(model, teacher_model)
        if any(term.ever_active and not term.always_active for term in args.schedules.values()):
            # What only one term reaches goes unused while that term is off, and DDP has to look for it.
            args.ddp_find_unused_parameters = True
        set_seed(args.seed)  # of new adapters, which are drawn before the base class sets it
        is_loaded: AbstractContextManager[None] = nullcontext()
        if isinstance(model, str):
            given = kwargs.get("processing_class"), kwargs.pop("quantization_config", None)
            model, kwargs["processing_class"] = load_student(model, args, *given)
            is_loaded = taken_as_loaded(args)
        with is_loaded, training_engines(vllm_generation) if args.use_vllm else nullcontext():
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                callbacks=callbacks,
                **kwargs,
            )
        self._end_turns()
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                "the student's tokenizer has no EOS token, so no rollout would end: set eos_token"
            )
        check_tokenizer(self._names["student"] or "the student", self.model, self._tokenizer)
        if self._is_vlm:
            raise UserError("the student is a vision-language model; oprd distils text-only models so far")
        if args.keep_attention:
            check_attention_kept(self.model, args.gradient_checkpointing, args.gradient_checkpointing_kwargs)
        if not args.disable_dropout and _has_dropout(self.model):
            logger.warning("the student learns with dropout, and its teacher has none: disable_dropout: true")
        if is_deepspeed_zero3_enabled():
            check_zero3(self.model, args)
        self.sharding = Sharding.of(self.accelerator)
        if self.sharding is not None:  # gradients of a window would be summed whole, on every rank
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        self.teacher = self._load_teacher(teacher_model, args)
        self._check_models()
        self.translation = self._translate(args)
        self._check_prompts()
        settle_steps(args, len(self.train_dataset), self.accelerator.num_processes)
        with whatever_fails_is(
            lambda error: f"optim: {args.optim.value}, optim_args: {args.optim_args}: {error}"
        ):
            chosen = self.get_optimizer_cls_and_kwargs(args, self.model)
        check_optimizer(args, *chosen)
        self._prepare_rollouts()
        for role, read in (("student", self.model), ("teacher", self.teacher.model)):
            with told_of_architecture(role, read):
                blocks(read)
        with told_of_architecture("student", self.model):
            self.update = Update.bind(
                args, self.model, self._tokenizer, self.teacher, self.accelerator.device
            )
        if is_deepspeed_zero3_enabled():
            self.teacher.reader = prepare_deepspeed(self.teacher.reader, self.accelerator)
        else:
            self.update.place(self.accelerator.device, self.sharding)
            self._try_models()
        heeds_padding(self.model)  # tried here, so that no step's meters count it
        heeds_padding(self.teacher.model, self.accelerator.device)
        self.engine, self.fixed_text = self._take_over_engine(), FixedText()
        self._add_recorder()

    # Set-up

    def _end_turns(self) -> None:
        """Let rollouts end at the ids that end a response elsewhere: TRL lacks the template's end of turn."""
        self.eos_token_ids = eos_token_ids(self.model, self._tokenizer, self.generation_config)
        self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    def _try_models(self) -> None:
        """Read a few tokens as updates will; models in shards are only read together, later."""
        if self.sharding is not None:
            return
        ours, theirs = self.update.layers_read
        with self.accelerator.autocast():
            try_states("student", self.model, ours, self.args.final_norm)
            if not self.use_vllm:
                try_rollout(self.model, self._tokenizer)
            self.teacher.try_states(theirs, self.args.final_norm, self.accelerator.device)

    def _load_teacher(self, teacher: str | PreTrainedModel, args: OPRDConfig) -> Teacher:
        init_kwargs = teacher_kwargs(args)
        if args.teacher_quantization != "none":
            init_kwargs["quantization_config"] = quantization(args.teacher_quantization)
        precision = Precision.of(self.model, args, self.accelerator.distributed_type)
        made = (
            Teacher.load(teacher, init_kwargs, precision) if isinstance(teacher, str) else Teacher.of(teacher)
        )
        if args.teacher_quantization == "none":
            precision.warn_of_rounding(made.model)
        return made

    def _translate(self, args: OPRDConfig) -> Translation:
        translation = Translation(
            self._tokenizer,
            self.teacher.tokenizer,
            args.teacher_chat_template,
            args.teacher_tokenization,
            args.teacher_chat_template_kwargs,
            self.eos_token_ids,
        )
        if translation.feeds_foreign_ids:
            self.teacher.check_ids(self.model)
        if translation.aligner is not None and self.tools:
            raise UserError("tools need a teacher of the student's tokenizer: its turns cannot be translated")
        return translation

    def _take_over_engine(self) -> StudentEngine | None:
        if not self.use_vllm:
            return None
        if self.vllm_mode == "server" and self.accelerator.is_main_process:
            check_server(self.vllm_generation.vllm_client, self.args)
        self.vllm_generation = StudentEngine(self.vllm_generation, self.update.stopwatch, self.eos_token_ids)
        return self.vllm_generation

    def _add_recorder(self) -> None:
        self.memory = MemoryMeter(self.accelerator.device)
        self.recorder = Recorder(
            self.update.averages,
            self.update.stopwatch,
            self.memory,
            self._sum_over_ranks,
            self._publish,
            self._begin,
        )
        for printer in (ProgressCallback, PrinterCallback):
            self.remove_callback(printer)
        self.add_callback(self.recorder)
        self.supervision = SupervisionWatch(self.args)
        self.recorder.observers.append(self.supervision.observe)
        self.recorder.resumers.append(self.supervision.resume)
        self.stopping = Stopping(self._sum_over_ranks)  # after the recorder, which may measure for long
        self.add_callback(self.stopping)
        comparison = self.update.comparison
        if comparison.bridge is None:
            self.recorder.observers.append(warn_of_another_origin)
        else:
            monitor = DriftMonitor(comparison.bridge, comparison.layer_map.student_layers)
            self.recorder.observers.append(monitor.observe)
            self.recorder.resumers.append(monitor.resume)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")

    def _begin(self, state: TrainerState) -> None:
        """Say what begins, and write it down, unless the command that trains has."""
        if self.resolved is None:
            folder, names = Path(self.args.output_dir), {"model_name_or_path": self._names["student"]}
            names["teacher_model_name_or_path"] = self._names["teacher"]
            processes = {"num_processes": self.accelerator.num_processes}
            write_resolved(folder, resolved_settings(self.args) | names | processes, inputs={})
        steps = state.global_step + 1, state.max_steps
        ranks = self.accelerator.num_processes
        logger.info(start_line(self.args, self.update.layer_map, ranks, *steps))

    def _publish(self, values: dict[str, float]) -> None:
        for name in values.keys() - {"grad_norm", "learning_rate"}:
            # transformers puts all names under train/ for the trackers, but for those that begin with eval_.
            logged = name.replace("eval/", "eval_", 1) if name.startswith("eval/") else name
            self._metrics["train"][logged].append(values[name])

    # Rollouts

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return EpochSampler(
            epoch=lambda: int(self.state.epoch or 0),
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=self._prompts_per_step,
            repeat_count=self.args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    # What is saved

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        if not self.is_world_process_zero():
            return
        plain, others = resolved_settings(self.args), ("max_steps", "learning_rate", "temperature")
        settings = {name: plain[name] for name in (*ObjectiveSettings.__dataclass_fields__, *others)}
        folder = Path(self.args.output_dir)
        card = model_card(folder, **self._names, dataset=dataset_name, settings=settings)
        write_whole(folder / "README.md", card)


def _has_dropout(model: torch.nn.Module) -> bool:
    """Whether a model drops states at random, adapters aside."""
    layers = (module for name, module in model.named_modules() if "lora_dropout" not in name)
    return any(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in layers)


def _name(model: str | PreTrainedModel | None) -> str:
    """What to call a model in its card: its name, or its class if it was made in memory."""
    if model is None or isinstance(model, str):
        return model or ""
    return model.config._name_or_path or type(model).__name__
