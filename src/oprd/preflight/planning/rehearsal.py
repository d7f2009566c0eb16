"""A run's models as fake tensors, and what the run does with them: its first step, last token and update."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from oprd.bridge.artifact import TENSORS
from oprd.foundation.foreign.torch import tree_leaves
from oprd.models.capture import blocks
from oprd.models.precision import Precision
from oprd.models.sharding.fsdp import Sharding
from oprd.models.teacher import Teacher, differing_ends
from oprd.preflight.longest import Longest, rollouts_at_once, sample_last_token
from oprd.preflight.planning import footprint as parts
from oprd.preflight.planning.fakes import (
    make_optimizer,
    make_reference,
    make_student,
    make_teacher,
    shard_student,
)
from oprd.preflight.planning.footprint import Footprint
from oprd.preflight.planning.machine import Machine
from oprd.rollouts.rows import RolloutBatch, RolloutInputs, weigh_rows
from oprd.training.step import Update
from oprd.training.training_pair import TrainingPair

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
        self.settings, self.longest, self.machine = settings, longest, machine
        self.footprint = Footprint(machine.device, gloo=not machine.is_gpu)
        self.student = make_student(student, settings, peft_config)
        kind = DistributedType.NO if mesh is None else DistributedType.FSDP
        teacher = make_teacher(settings, Precision.of(self.student, settings, kind))
        reference = make_reference(settings, Precision.of(self.student, settings, kind))
        with self.footprint.shapes:
            for model in filter(None, (self.student, teacher, reference)):
                model.to_empty(device=machine.device).tie_weights()
        tokenizer, theirs = longest.tokenizers
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            named = Teacher(reference, theirs) if reference is not None else None
            frozen = Teacher(teacher, theirs)
            ends = differing_ends(self.student, tokenizer, frozen)
            pair = TrainingPair(self.student, tokenizer, frozen, machine.device, named, ends)
            self.objective = Update.bind(settings, pair)
        self.objective.freeze_unreached()
        self._sharding = self._shard(mesh) if mesh is not None else None
        hold_references(self.objective, self.footprint)
        self.footprint.hold_model(parts.STUDENT, self.student)
        self.footprint.hold_model(parts.TEACHER, teacher)
        self.trained = [weight for weight in self.student.parameters() if weight.requires_grad]
        for weight in self.trained:
            weight.register_post_accumulate_grad_hook(lambda w: self.footprint.hold(parts.GRADIENTS, w.grad))
        self._optimizer = make_optimizer(settings, self.student, self.trained)

    def first_step(self) -> None:
        """The optimiser's first step, after which its state is there."""
        with self.footprint.part(parts.GRADIENTS):
            for weight in self.trained:
                weight.grad = torch.zeros_like(weight)
        self._step()

    def roll_out(self) -> None:
        """The last token of all the rollouts that a step asks Hugging Face's generate for."""
        count = self.settings.per_device_train_batch_size * self.settings.gradient_accumulation_steps
        rollouts = self.longest.rollouts(count, self.machine.device)
        whole = self._sharding.whole(self.student) if self._sharding else nullcontext()
        with whole, self.footprint.part(parts.SAMPLING), self._autocast():
            sample_last_token(self.student, rollouts, self.settings)

    def update(self, step: int) -> None:
        """Update `step`, 0-based: two micro-batches, or the one there is, and a step."""
        size, count = rollouts_at_once(self.settings, self.longest)
        batch = RolloutBatch.of(self.inputs(size))
        for _ in range(min(count, 2)):
            with self._autocast():
                loss = self._loss(batch, step)
            loss.backward()
            del loss
        if self.settings.max_grad_norm:
            nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
        self._step()
        self.objective.watch.clear()
        self.objective.averages.pop(lambda values: torch.zeros(values.shape))

    def inputs(self, count: int) -> RolloutInputs:
        """A micro-batch of `count` of the longest rollouts, with the weight of every row."""
        batch = self.longest.rollouts(count, self.machine.device)
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        batch |= self.longest.translation.read([self.longest.prompt] * count, ids, mask)[0]
        if self.settings.use_vllm:
            batch |= {"engine_log_probs": torch.zeros_like(ids, dtype=torch.float)}
        whole, output = torch.zeros(count, dtype=torch.bool), self.objective.output
        common = output.vocabulary, output.shared
        return batch | weigh_rows(batch, whole, self.settings, lambda units: units, *common)

    @property
    def resting_teacher_bytes(self) -> int | None:
        """Bytes of a teacher's weights that rest elsewhere or in fewer bits; None if it is neither."""
        model, kind = self.objective.teacher.model, self.settings.teacher_quantization
        stack = list(blocks(model))
        if kind != "none":
            linear = [m.weight for block in stack for m in block.modules() if isinstance(m, nn.Linear)]
            return int(_bytes(model) - sum(x.nbytes - x.numel() * QUANTISED_BYTES[kind] for x in linear))
        if self.settings.teacher_offload and self.machine.is_gpu:  # a block at a time is here, or the rest
            sizes = [_bytes(block) for block in stack]
            return max(*sizes, _bytes(model) - sum(sizes))
        at = (self.settings.teacher_model_init_kwargs or {}).get("device_map")
        return 0 if at == "cpu" and self.machine.is_gpu else None

    @property
    def saved_bytes(self) -> tuple[int, int, int]:
        """On disk: the trained model or its adapters; a checkpoint, after a step; what a run ends with."""
        adapters = hasattr(self.student, "peft_config")
        model = sum(weight.nbytes for weight in self.trained) if adapters else _bytes(self.student)
        state = tree_leaves(list(self._optimizer.state.values()))
        checkpoint = model + sum(x.nbytes for x in state if isinstance(x, Tensor))
        frozen = sum(weight.numel() for weight in self.student.parameters() if not weight.requires_grad)
        return model, checkpoint, model + adapters * MERGED_BYTES * frozen

    def _shard(self, mesh: DeviceMesh) -> Sharding:
        """Keep this rank's shards of every model."""
        update, device = self.objective, self.machine.device
        with self.footprint:
            sharding = shard_student(self.student, self.settings, mesh, device)
            update.place(device, sharding)
        references = [each.reference.reader for each in (update.anchor, update.extrapolation) if each]
        models = [self.student, update.teacher.reader, *references]
        for unit in (m for model in models for m in model.modules() if isinstance(m, FSDPModule)):
            for change in (unit.unshard, unit.reshard):
                self.footprint.peak_of(change)  # whose freed storages are known as unsharded layers
        return sharding

    def _loss(self, batch: RolloutBatch, step: int) -> Tensor:
        """The loss inside the student's forward, in which FSDP has the weights ready."""

        def loss() -> Tensor:
            del self.student.forward
            return self.objective.loss(batch, step)

        self.student.forward = loss
        return self.student()

    def _step(self) -> None:
        with self.footprint.part(parts.OPTIMISER):
            self._optimizer.step()
        for weight in self.trained:
            weight.grad = None

    def _autocast(self) -> AbstractContextManager:
        mixed = self.settings.bf16 or self.settings.fp16
        dtype = torch.bfloat16 if self.settings.bf16 else torch.float16
        return torch.autocast(self.machine.device.type, dtype if mixed else None, enabled=mixed)


def hold_references(update: Update, footprint: Footprint) -> None:
    """Count the bridge, the anchor and the extrapolation of an update, which belong to neither model."""
    bridge, anchor = update.comparison.bridge, update.anchor
    for projector in bridge.projectors.values() if bridge else ():
        footprint.hold(parts.REFERENCE, *(getattr(projector, name) for name in TENSORS))
    if anchor is not None:
        footprint.hold(parts.REFERENCE, *anchor.determined.values())
    for each in (anchor, update.extrapolation):
        if each is not None and each.reference.model is not update.student:
            footprint.hold_model(parts.REFERENCE, each.reference.model)


def _bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
