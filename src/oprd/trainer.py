"""OPRD on TRL: rollouts, buffering, checkpoints and distribution are TRL's, the update is ours.

The only module that imports trl.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.utils import RepeatSampler

from oprd.alignment import AlignedResponse
from oprd.batch import TERMS, Batch, on_host, truncated_rollouts, weigh_rows
from oprd.bridge.drift import DriftMonitor
from oprd.card import model_card
from oprd.checkpoints import rotate, written_whole
from oprd.errors import UserError
from oprd.finite import NonFiniteLoss
from oprd.intake import usable_prompts
from oprd.meters import MemoryMeter
from oprd.models import resolve_model
from oprd.packing import repack
from oprd.recorder import Recorder
from oprd.rollouts import render_prompt
from oprd.settings import ObjectiveSettings
from oprd.teacher import Teacher
from oprd.translation import Translation
from oprd.update import Update

logger = logging.getLogger(__name__)

PACKED = "micro_batches"  # where a buffered batch is a list of others


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

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: steps, or a share if below 1."})
    max_steps: int = field(default=500, metadata={"help": "Optimiser steps."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Rollouts per micro-batch."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches per step."})
    max_completion_length: int | None = field(default=16384, metadata={"help": "Longest rollout, in tokens."})
    logging_steps: float = field(default=1, metadata={"help": "Log to the trackers every n steps."})
    # Ours ends the run; transformers' would wait for the device at every micro-batch.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})

    def __post_init__(self) -> None:
        if self.beta != 1.0:
            raise UserError(
                "beta is TRL's name for the divergence; use divergence: reverse_kl, forward_kl or jsd"
            )
        self.check()
        # Without it, transformers refuses bf16 on a machine that has no accelerator.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


class OPRDTrainer(DistillationTrainer):
    """On-policy distillation in representation space, output space, or both (Eq. 6–7).

    `model` and `teacher_model` are names (`tiny:student`, a folder, a Hub name) or model objects;
    other arguments are those of `trl.DistillationTrainer`. Raises `UserError` for anything the user can
    mend, before the first rollout.
    """

    _tag_names = ("trl", "oprd")
    _name = "OPRD"
    _buffered_inputs: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: OPRDConfig | None = None,
        train_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or OPRDConfig()
        teacher_model = teacher_model or args.teacher_model_name_or_path
        self._names = {"student": _name(model), "teacher": _name(teacher_model)}
        if teacher_model is None:
            raise UserError("no teacher: set teacher_model_name_or_path to a name, a folder or tiny:teacher")
        if not isinstance(train_dataset, Dataset):
            raise UserError(f"train_dataset must be a datasets.Dataset, got {type(train_dataset).__name__}")
        if teacher_model is model and not isinstance(model, str):
            teacher_model = copy.deepcopy(model)  # the teacher is frozen, the student is not
        if any(term.ever_active and not term.always_active for term in args.schedules.values()):
            # What only one term reaches goes unused while that term is off, and DDP has to look for it.
            args.ddp_find_unused_parameters = True
        super().__init__(
            model=resolve_model(model) if isinstance(model, str) else model,
            args=args,
            train_dataset=train_dataset,
            callbacks=callbacks,
            **kwargs,
        )
        if self._is_vlm:
            raise UserError("the student is a vision-language model; oprd distils text-only models so far")
        self._check_batch(args)
        self.train_dataset = usable_prompts(
            train_dataset, self._render, args.max_prompt_length, self._prompts_per_step
        )
        self.teacher = self._load_teacher(teacher_model, args)
        self.translation = self._translate(args)
        self.update = Update.bind(args, self.model, self._tokenizer, self.teacher, self.accelerator.device)
        self._add_recorder()

    # Set-up

    def _load_teacher(self, teacher: str | PreTrainedModel, args: OPRDConfig) -> Teacher:
        init_kwargs = dict(args.teacher_model_init_kwargs or {})
        if args.teacher_model_revision is not None:
            init_kwargs.setdefault("revision", args.teacher_model_revision)
        init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        # In full precision a teacher in its checkpoint's bfloat16 would differ from an equal student.
        init_kwargs.setdefault("dtype", "auto" if args.bf16 or args.fp16 else "float32")
        if isinstance(teacher, str):
            return Teacher.load(teacher, self.accelerator.device, init_kwargs)
        return Teacher.of(teacher, self.accelerator.device)

    def _translate(self, args: OPRDConfig) -> Translation:
        translation = Translation(
            self._tokenizer,
            self.teacher.tokenizer,
            args.teacher_chat_template,
            args.teacher_tokenization,
            args.teacher_chat_template_kwargs,
        )
        if translation.feeds_foreign_ids:
            self.teacher.check_ids(self.model)
        if translation.aligner is not None and self.tools:
            raise UserError("tools need a teacher of the student's tokenizer: its turns cannot be translated")
        if not translation.is_identity:
            translation.prompts([self.train_dataset[0]["prompt"]], **self._tool_kwargs(translation))
        return translation

    def _check_batch(self, args: OPRDConfig) -> None:
        if self._completions_per_step % args.num_generations:
            raise UserError(
                f"a step has {self._completions_per_step} completions (per_device_train_batch_size × "
                "gradient_accumulation_steps × processes), which num_generations="
                f"{args.num_generations} does not divide: change one of them"
            )

    @property
    def _completions_per_step(self) -> int:
        per_process = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return per_process * self.accelerator.num_processes

    @property
    def _prompts_per_step(self) -> int:
        return self._completions_per_step // self.args.num_generations

    def _render(self, prompt: Any) -> list[int]:
        return render_prompt(self._tokenizer, prompt, self.chat_template_kwargs)

    def _add_recorder(self) -> None:
        self.memory = MemoryMeter(self.accelerator.device)
        self.recorder = Recorder(
            self.update.averages, self.update.stopwatch, self.memory, self._sum_over_ranks, self._publish
        )
        for printer in (ProgressCallback, PrinterCallback):
            self.remove_callback(printer)
        self.add_callback(self.recorder)
        comparison = self.update.comparison
        if comparison.bridge is not None:
            monitor = DriftMonitor(comparison.bridge, comparison.layer_map.student_layers)
            self.recorder.observers.append(monitor.observe)
            self.recorder.resumers.append(monitor.resume)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")

    def _publish(self, values: dict[str, float]) -> None:
        for name in values.keys() - {"grad_norm", "learning_rate"}:
            self._metrics["train"][name].append(values[name])

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

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts, with the weight of every row, counted over ranks and the whole window."""
        with self.update.stopwatch.part("rollout"):
            batch = on_host(super()._generate_and_score_completions(inputs))
        aligned: list[AlignedResponse] = []
        if not self.translation.is_identity:
            prompts = [row["prompt"] for row in inputs]
            read = self.translation.prompts(prompts, **self._tool_kwargs(self.translation))
            ids = {"teacher_prompt_ids": read["teacher_prompt_ids"].to(self.accelerator.device)}
            batch |= read | ids
            read, aligned = self.translation.responses(batch["completion_ids"], batch["completion_mask"])
            batch |= read
        batch |= self._row_weights(batch)
        if self.model.training:
            self._describe(batch, aligned)
            self._observe(batch)
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The next micro-batch of the window; with a token budget, a list of them in its place."""
        inputs = super()._prepare_inputs(generation_batch)
        budget = self.args.max_tokens_per_micro_batch
        if budget is None or not self.model.training:
            return inputs
        if PACKED not in inputs:  # a window that has just been rolled out
            window = self._buffered_inputs
            self._buffered_inputs = [{PACKED: parts} for parts in repack(window, budget)]
            inputs = self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        return inputs

    def _row_weights(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        truncated = truncated_rollouts(batch, self.eos_token_ids)
        vocabulary = self.update.output.vocabulary
        return weigh_rows(batch, truncated, self.args, self._sum_over_ranks, vocabulary)

    def _describe(self, batch: dict[str, Any], aligned: list[AlignedResponse]) -> None:
        averages, lengths = self.update.averages, batch["completion_mask"].sum(-1).float()
        truncated = truncated_rollouts(batch, self.eos_token_ids)
        left_out = truncated.sum() * self.args.mask_truncated_completions
        averages.add("rollout/mean_length", lengths.sum(), len(lengths))
        averages.add("rollout/truncated_share", truncated.sum(), len(lengths))
        averages.add("rollout/left_out", left_out)
        if aligned:
            paired, rows = sum(len(a.rows) for a in aligned), sum(a.num_rows for a in aligned)
            averages.add("rollout/coverage", paired, rows)
            averages.add("rollout/invalid_utf8", sum(a.invalid_utf8 for a in aligned))
        for term in TERMS[:2]:
            averages.add(f"rollout/{term}_rows", (batch[f"{term}_weights"] > 0).sum())

    def _observe(self, batch: dict[str, Any]) -> None:
        every = self.args.diagnostics_steps
        if every and (self.state.global_step + 1) % every == 0:
            size = self.args.per_device_train_batch_size
            first = {key: value[:size] for key, value in batch.items() if value.ndim}
            with self.update.stopwatch.part("diagnostics"), self.accelerator.autocast():
                self.update.observe(Batch.of(first), self.state.global_step)

    def _tool_kwargs(self, translation: Translation) -> dict[str, Any]:
        """Template arguments by which the teacher's prompts show the tools."""
        if not self.tools:
            return {}
        return {"tools": self.tools} | (
            {} if translation.own_template else {"chat_template": self.chat_template}
        )

    # The update

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        with self.update.stopwatch.part("student"):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Eq. 7 on one micro-batch, run inside the wrapper's forward so that DDP and FSDP see it."""
        if self.model.training and self._step % self.args.gradient_accumulation_steps == 0:
            self.memory.start()
            self.update.watch.clear()
        if "representation_weights" not in inputs and PACKED not in inputs:
            inputs = on_host(inputs)  # rollouts that somebody gave: a window of their own
            inputs = inputs | self._row_weights(inputs)
        loss = self._packed_loss(model, inputs[PACKED]) if PACKED in inputs else self._one_loss(model, inputs)
        return (loss, None) if return_outputs else loss

    def _packed_loss(self, model: torch.nn.Module, parts: list[dict[str, Any]]) -> Tensor:
        """The loss of the last micro-batch, plus those of the others, whose gradients are taken here."""
        total = torch.zeros((), device=self.accelerator.device, requires_grad=True)
        for part in parts[:-1]:
            with self.accelerator.no_sync(model):
                loss = self._one_loss(model, part)
                self.accelerator.backward(loss)
            total = total + loss.detach()
        return total + self._one_loss(model, parts[-1]) if parts else total

    def _one_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        unwrapped = self.accelerator.unwrap_model(model)
        return self._forward_redirection(model, unwrapped, self._loss, Batch.of(inputs))

    def _loss(self, batch: Batch) -> Tensor:
        # TRL's redirection goes past the forward that accelerate wrapped in autocast.
        with self.accelerator.autocast():
            loss = self.update.loss(batch, self.state.global_step)
        # DDP and FSDP average gradients over ranks; the weights already sum to one over all of them.
        return loss * self.accelerator.num_processes

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(*args, **kwargs)
        self.update.stopwatch.pop()
        self._check_finite()
        for name, value in self.update.averages.pop(self._sum_over_ranks).items():
            self._metrics["eval"][name].append(value)
        return result

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """This step's gradient norm; the run ends before a step whose losses or gradient are not finite."""
        self._check_finite()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            self.recorder.grad_norm = float(norm)
            if not torch.isfinite(torch.tensor(self.recorder.grad_norm)):
                raise RuntimeError(
                    f"step {self.state.global_step + 1}: the gradient is not finite although the loss is; "
                    "lower the learning rate or the loss weights"
                )
        return norm

    def _check_finite(self) -> None:
        try:
            self.update.watch.check()
        except NonFiniteLoss as error:
            prompts = [text[:300] for text in self._tokenizer.batch_decode(error.rollouts[:4])]
            where = f"step {self.state.global_step + 1}: {error}"
            raise RuntimeError(f"{where}, in rollouts of {prompts}") from error

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The base class would take one more step after resuming from a checkpoint of the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # What is saved

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The base class's checkpoint, sealed when every rank has written; only then may older ones go."""
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

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        if not self.is_world_process_zero():
            return
        settings = {name: getattr(self.args, name) for name in ObjectiveSettings.__dataclass_fields__}
        settings |= {name: getattr(self.args, name) for name in ("max_steps", "learning_rate", "temperature")}
        folder = Path(self.args.output_dir)
        (folder / "README.md").write_text(
            model_card(folder, **self._names, dataset=dataset_name, settings=settings)
        )


def _name(model: str | PreTrainedModel | None) -> str:
    """What to call a model in its card: its name, or its class if it was made in memory."""
    if model is None or isinstance(model, str):
        return model or ""
    return model.config._name_or_path or type(model).__name__
