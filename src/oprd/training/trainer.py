"""OPRD on TRL: rollouts, buffering, checkpoints and distribution are TRL's, the update is ours.

Only this package imports trl.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from datasets import Dataset, IterableDataset
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
from transformers.training_args import OptimizerNames
from trl.models import prepare_deepspeed

from oprd.bridge.drift import DriftMonitor
from oprd.folders.card import model_card
from oprd.folders.recorder import Recorder
from oprd.folders.run_folder import output_folder, resolved_settings, write_resolved
from oprd.folders.saving import ResumableTrainer
from oprd.folders.schedule import check_optimizer
from oprd.folders.stopping import Stopping
from oprd.folders.whole import write_whole
from oprd.foundation.errors import UserError, whatever_fails_is
from oprd.foundation.meters import MemoryMeter
from oprd.models.capture import blocks
from oprd.models.eos import eos_token_ids
from oprd.models.freezing import apart_from
from oprd.models.init_kwargs import reference_kwargs, teacher_kwargs
from oprd.models.padding import heeds_padding
from oprd.models.precision import Precision
from oprd.models.sharding.fsdp import Sharding
from oprd.models.student import load_student, name_of
from oprd.models.teacher import Teacher, differing_ends, quantization
from oprd.models.trial import told_of_architecture, try_states
from oprd.rollouts.engines.staleness import FixedText
from oprd.rollouts.engines.student import StudentEngine
from oprd.rollouts.engines.vllm import check_server
from oprd.rollouts.intake import look_ahead, settle_steps, stream_length
from oprd.rollouts.translation import Translation
from oprd.rollouts.trial import try_rollout
from oprd.training.checks import check_arguments, check_student
from oprd.training.config import OPRDConfig
from oprd.training.epoch_sampler import EpochSampler
from oprd.training.foreign_trl import taken_as_loaded, training_engines
from oprd.training.origin import warn_of_another_origin
from oprd.training.start_line import start_line
from oprd.training.step import Update
from oprd.training.supervision import SupervisionWatch
from oprd.training.training_pair import TrainingPair
from oprd.training.update_trainer import UpdateTrainer

logger = logging.getLogger(__name__)


class OPRDTrainer(ResumableTrainer, UpdateTrainer):
    """On-policy distillation in representation space, output space, or both (Eq. 6–7).

    `model` and `teacher_model` are names (`tiny:student`, a folder, a Hub name) or model objects;
    other arguments are those of `trl.DistillationTrainer`. Of an `IterableDataset`, the prompts for
    `max_steps` steps are read into memory. Before the first rollout every prompt is rendered in every chat
    template that will be used, and `UserError` is raised for anything that the user can fix.
    """

    # Both stand on the Hub; until TRL takes them from a trainer's caller.
    _tag_names = ["trl", "oprd"]  # noqa: RUF012 - as the base class has it
    _name = "OPRD"
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
        teacher_model = teacher_model or args.teacher_model_name_or_path
        self._names = {"student": name_of(model), "teacher": name_of(teacher_model)}
        teacher_model = check_arguments(args, teacher_model, train_dataset, kwargs.get("eval_dataset"))
        if isinstance(train_dataset, IterableDataset):
            train_dataset = look_ahead(train_dataset, stream_length(args, args.world_size))
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
        with is_loaded, training_engines() if args.use_vllm else nullcontext():
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                callbacks=callbacks,
                **kwargs,
            )
        # In this order: each step reads what those before it have set or found to hold.
        self._end_turns()
        check_student(self.model, self._tokenizer, self._names["student"], self._is_vlm, args)
        self.sharding = self._find_sharding()
        self.teacher = self._load_teacher(teacher_model, args)
        self._share_ends()
        self._check_models()
        self.translation = self._translate(args)
        self._check_prompts()
        settle_steps(args, len(self.train_dataset), self.accelerator.num_processes)
        self._check_optimizer()
        self._prepare_rollouts()
        self.update = self._bind_update()
        self._place_models()
        self._try_padding()
        self.engine, self.fixed_text = self._take_over_engine(), FixedText()
        self._add_recorder()

    # Set-up

    def _end_turns(self) -> None:
        """Let rollouts end at the ids that end a response elsewhere: TRL lacks the template's end of turn."""
        self._end_at(eos_token_ids(self.model, self._tokenizer, self.generation_config))

    def _share_ends(self) -> None:
        """Let rollouts, and later responses of the saved student, end where the teacher's do, too."""
        self.ends = differing_ends(self.model, self._tokenizer, self.teacher)
        if not self.ends:
            return
        self._end_at(list(dict.fromkeys([*self.eos_token_ids, *self.ends])))
        self.model.generation_config.eos_token_id = self.eos_token_ids

    def _end_at(self, ids: list[int]) -> None:
        """Let rollouts end at these ids."""
        self.eos_token_ids = ids
        self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = ids

    def _find_sharding(self) -> Sharding | None:
        sharding = Sharding.of(self.accelerator)
        if sharding is not None:  # gradients of a window would be summed whole, on every rank
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        return sharding

    def _check_optimizer(self) -> None:
        args = self.args
        with whatever_fails_is(
            lambda error: f"optim: {OptimizerNames(args.optim).value}, optim_args: {args.optim_args}: {error}"
        ):
            chosen = self.get_optimizer_cls_and_kwargs(args, self.model)
        check_optimizer(args, *chosen)

    def _bind_update(self) -> Update:
        """The objective, bound to both models; what no term of it reaches is frozen."""
        for role, read in (("student", self.model), ("teacher", self.teacher.model)):
            with told_of_architecture(role, read):
                blocks(read)
        with told_of_architecture("student", self.model):
            device, reference = self.accelerator.device, self._load_reference()
            pair = TrainingPair(self.model, self._tokenizer, self.teacher, device, reference, self.ends)
            update = Update.bind(self.args, pair)
            update.freeze_unreached()
        return update

    def _place_models(self) -> None:
        """Put the teacher, and a copy of the student, where they are read; try what can be tried there."""
        if is_deepspeed_zero3_enabled():
            self.teacher.reader = prepare_deepspeed(self.teacher.reader, self.accelerator)
        else:
            self.update.place(self.accelerator.device, self.sharding)
            self._try_models()

    def _try_models(self) -> None:
        """Read a few tokens as updates will; sharded models are skipped."""
        if self.sharding is not None:
            return
        student_layers, teacher_layers = self.update.layers_read
        with self.accelerator.autocast():
            try_states("student", self.model, student_layers, self.args.final_norm)
            if not self.use_vllm:
                try_rollout(self.model, self._tokenizer)
            self.teacher.try_states(teacher_layers, self.args.final_norm, self.accelerator.device)

    def _try_padding(self) -> None:
        """Find out what models make of padding: here, so that no step's meters count it."""
        heeds_padding(self.model)
        heeds_padding(self.teacher.model, self.accelerator.device)

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

    def _load_reference(self) -> Teacher | None:
        """The model that targets are extrapolated from, loaded as the teacher is, where one is named."""
        name = self.args.reference_model_name_or_path
        if name is None:
            return None
        precision = Precision.of(self.model, self.args, self.accelerator.distributed_type)
        return Teacher.load(name, reference_kwargs(self.args), precision)

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
            raise UserError("tools need a teacher with the student's tokenizer: turns cannot be aligned")
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

    def _begin(self, state: TrainerState) -> None:
        """Log what begins, and write `resolved.yaml`, unless the command has."""
        if self.resolved is None:
            folder, names = output_folder(self.args), {"model_name_or_path": self._names["student"]}
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
        """TRL's, in an order that a resumed run repeats (`EpochSampler`); until TRL's own does."""
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

    def create_model_card(  # type: ignore[override]  # TRL's, with fewer parameters than transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """TRL's card says nothing of how a run was set; until TRL takes a template of one."""
        if not self.is_world_process_zero():
            return
        folder = output_folder(self.args)
        settings = resolved_settings(self.args) | (self.resolved or {})
        card = model_card(folder, **self._names, dataset=dataset_name, settings=settings)
        write_whole(folder / "README.md", card)
