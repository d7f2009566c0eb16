"""A run's models as fake tensors, and what the run does with them: its first step, last token and update."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from oprd.models.activation_checkpointing import checkpoint_blocks
from oprd.models.capture import blocks
from oprd.models.init_kwargs import hub_kwargs, student_kwargs, teacher_kwargs
from oprd.models.loading import base_model, load_tokenizer, resolve_model
from oprd.models.precision import Precision, store_products_in
from oprd.models.sharding.fsdp import Sharding
from oprd.models.teacher import Teacher
from oprd.preflight.planning.blueprint import make_optimizer, on_meta
from oprd.preflight.planning.counted import counted
from oprd.preflight.planning.decoding import sample_last_token
from oprd.preflight.planning.footprint import Footprint
from oprd.preflight.planning.longest import Longest, rollouts_at_once
from oprd.preflight.planning.machine import Machine
from oprd.preflight.planning.parts import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMISER,
    REFERENCE,
    SAMPLING,
    STUDENT,
    TEACHER,
)
from oprd.preflight.planning.pretended import shard_student
from oprd.rollouts.rows import Inputs, RolloutBatch, weigh_rows
from oprd.rollouts.translation import Translation
from oprd.training.step import Update
from oprd.training.training_pair import TrainingPair

BYTES_OF_A_TOKEN = 32  # on the host: four ids, as a tokenizer of bytes may make of one
MERGED_BYTES = 4  # of a number of the model that adapters are merged into
QUANTISED_BYTES = {"8bit": 1, "4bit": 0.5 + 4 / 64}  # with a float32 scale for 64 weights


class Rehearsal:
    """What a run with the keys of `settings`, an `OPRDConfig`, would build on `machine`, as fake tensors.

    With a `mesh` its ranks share the models. Raises `UserError` where the run would.
    """

    def __init__(
        self,
        student: str,
        settings: Any,
        longest: Longest,
        machine: Machine,
        peft_config: Any = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.settings, self.longest, self.device = settings, longest, machine.device
        self._is_gpu = machine.is_gpu
        self._maps_files = not machine.is_gpu and machine.ranks == 1  # several move their weights
        self.footprint = Footprint(self.device, BYTES_OF_A_TOKEN * _rollouts(settings) * longest.num_tokens)
        given = student_kwargs(settings)
        located = resolve_model(student, **hub_kwargs(given))
        self._tokenizer = load_tokenizer(located, **hub_kwargs(given))
        self.student = self._student(located, given, peft_config)
        kind = DistributedType.NO if mesh is None else DistributedType.FSDP
        self._precision = Precision.of(self.student, settings, kind)
        self.teacher = self._teacher(settings.teacher_model_name_or_path, teacher_kwargs(settings))
        self.objective = self._bind()
        self._sharding = self._shard(mesh) if mesh is not None else None
        self._trained = [weight for weight in self.student.parameters() if weight.requires_grad]
        for weight in self._trained:
            weight.register_post_accumulate_grad_hook(lambda w: self.footprint.hold(w.grad, GRADIENTS))
        self._optimizer = make_optimizer(settings, self.student, self._trained)

    def first_step(self) -> None:
        """The optimiser's first step, after which its state is there."""
        self._fill_gradients()
        self._step()

    def roll_out(self) -> None:
        """The last token of all the rollouts that a step asks Hugging Face's generate for."""
        rollouts = self.longest.rollouts(_rollouts(self.settings), self.device)
        whole = self._sharding.whole(self.student) if self._sharding else nullcontext()
        with whole, self.footprint.part(SAMPLING), self._autocast():
            sample_last_token(self.student, rollouts, self.settings)

    def update(self, step: int) -> None:
        """Update `step`, 0-based: two micro-batches, or the one there is, and a step."""
        settings = self.settings
        size, count = rollouts_at_once(
            settings,
            self.longest,
            settings.per_device_train_batch_size,
            settings.gradient_accumulation_steps,
        )
        batch = RolloutBatch.of(self.inputs(size))
        for _ in range(min(count, 2)):
            with self.footprint.part(ACTIVATIONS):
                with self._autocast():
                    loss = self._through(batch, step)
                loss.backward()
                del loss
        if settings.max_grad_norm:
            nn.utils.clip_grad_norm_(self._trained, settings.max_grad_norm)
        self._step()
        self.objective.watch.clear()
        self.objective.averages.pop(lambda values: torch.zeros(values.shape))

    def largest_block(self, model: nn.Module) -> int:
        """Bytes of a sharded `model`'s weights that are unsharded at a time: a block's, or the root's."""
        stack = list(blocks(model))
        sizes = [_bytes(block) for block in stack]
        return max(*sizes, _bytes(model) - sum(sizes))

    @property
    def resting_teacher_bytes(self) -> int | None:
        """Bytes of a teacher's weights that rest elsewhere or in fewer bits; None if it is neither."""
        model, kind = self.teacher.model, self.settings.teacher_quantization
        if kind != "none":
            linear = [
                m.weight for block in blocks(model) for m in block.modules() if isinstance(m, nn.Linear)
            ]
            saved = sum(weight.nbytes - weight.numel() * QUANTISED_BYTES[kind] for weight in linear)
            return int(_bytes(model) - saved)
        if self.settings.teacher_offload and self._is_gpu:
            return self.largest_block(model)
        return None

    @property
    def trained_bytes(self) -> int:
        """Bytes of the weights that are trained."""
        return sum(weight.nbytes for weight in self._trained)

    @property
    def saved_bytes(self) -> tuple[int, int, int]:
        """On disk: the trained model or its adapters; a checkpoint, after a step; what a run ends with."""
        adapters = hasattr(self.student, "peft_config")
        model = self.trained_bytes if adapters else _bytes(self.student)
        state = tree_leaves(list(self._optimizer.state.values()))
        checkpoint = model + sum(x.nbytes for x in state if isinstance(x, Tensor))
        frozen = sum(weight.numel() for weight in self.student.parameters() if not weight.requires_grad)
        return model, checkpoint, model + adapters * MERGED_BYTES * frozen

    def _through(self, batch: RolloutBatch, step: int) -> Tensor:
        """The loss inside the student's forward, in which FSDP has the weights ready."""

        def loss() -> Tensor:
            del self.student.forward
            return self.objective.loss(batch, step)

        self.student.forward = loss
        return self.student()

    def _shard(self, mesh: DeviceMesh) -> Sharding:
        """Keep this rank's shards of every model."""
        with self.footprint:
            sharding = shard_student(self.student, self.settings, mesh, self.device)
            self.objective.place(self.device, sharding)
        anchor, models = self.objective.anchor, {STUDENT: self.student, TEACHER: self.teacher.reader}
        if anchor is not None and anchor.reference.model is not self.student:
            models[REFERENCE] = anchor.reference
        for part, model in models.items():
            for weight in model.parameters():
                self.footprint.hold(weight, part)
            for unit in (module for module in model.modules() if isinstance(module, FSDPModule)):
                with self.footprint:  # which recognises an unsharded layer once it was freed
                    unit.unshard()
                    unit.reshard()
        return sharding

    def _student(self, located: str, given: dict[str, Any], peft_config: Any) -> Any:
        settings = self.settings
        model, is_mapped = on_meta(located, {"dtype": "float32"} | given)
        if peft_config is not None:
            from peft import get_peft_model

            with torch.device("meta"):
                model = get_peft_model(model, peft_config)
            if settings.gradient_checkpointing:
                model.enable_input_require_grads()
        if settings.gradient_checkpointing:
            checkpoint_blocks(model, settings.gradient_checkpointing_kwargs)
        return self._place(model, STUDENT, self.device, is_mapped).train()

    def _teacher(self, name: str, given: dict[str, Any]) -> Teacher:
        located = base_model(resolve_model(name, **hub_kwargs(given)))
        config = AutoConfig.from_pretrained(located, **hub_kwargs(given))
        quantized = self.settings.teacher_quantization != "none"
        dtype = given.get("dtype", self._precision.of_teacher(config, quantized))
        model, is_mapped = on_meta(located, given | {"dtype": dtype})
        if "dtype" not in given and self._precision.autocast:
            store_products_in(config.dtype, model, is_exact=True)
        elsewhere = given.get("device_map") == "cpu"
        device = torch.device("cpu") if elsewhere else self.device
        model = self._place(model, TEACHER, device, is_mapped)
        return Teacher(model, load_tokenizer(located, **hub_kwargs(given)))

    def _place(self, model: Any, part: str, device: torch.device, is_mapped: bool) -> Any:
        for tensor in self.footprint.without_values(model, device):
            (self.footprint.hold_when_read if is_mapped and self._maps_files else self.footprint.hold)(
                tensor, part
            )
        return model

    def _bind(self) -> Update:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            pair = TrainingPair(self.student, self._tokenizer, self.teacher, self.device)
            update = Update.bind(self.settings, pair)
            update.freeze_unreached()
        return counted(update, self.footprint)

    def inputs(self, count: int) -> Inputs:
        """A micro-batch of `count` of the longest rollouts, with the weight of every row."""
        settings, batch = self.settings, self.longest.rollouts(count, self.device)
        translation = Translation(
            self._tokenizer,
            self.teacher.tokenizer,
            settings.teacher_chat_template,
            settings.teacher_tokenization,
            settings.teacher_chat_template_kwargs,
        )
        prompts = [self.longest.prompt] * count
        batch |= translation.read(prompts, batch["completion_ids"], batch["completion_mask"])[0]
        if settings.use_vllm:
            batch |= {"engine_log_probs": torch.zeros(batch["completion_ids"].shape, device=self.device)}
        whole = torch.zeros(count, dtype=torch.bool)
        vocabulary = self.objective.output.vocabulary
        return batch | weigh_rows(batch, whole, settings, lambda units: units, vocabulary)

    def _fill_gradients(self) -> None:
        with self.footprint.part(GRADIENTS):
            for weight in self._trained:
                weight.grad = torch.zeros_like(weight)

    def _step(self) -> None:
        with self.footprint.part(OPTIMISER):
            self._optimizer.step()
        for weight in self._trained:
            weight.grad = None

    def _autocast(self) -> AbstractContextManager:
        mixed = self.settings.bf16 or self.settings.fp16
        dtype = torch.bfloat16 if self.settings.bf16 else torch.float16
        return torch.autocast(self.device.type, dtype if mixed else None, enabled=mixed)


def _rollouts(settings: Any) -> int:
    """The rollouts of one rank's step."""
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps


def _bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
