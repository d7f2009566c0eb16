"""A trainer's update: the losses of a window of rollouts, and the gradient norm that ends its step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from oprd.foundation.errors import Fault
from oprd.models.finite import NonFiniteLoss
from oprd.rollouts.rows import RolloutBatch, RolloutInputs, on_host
from oprd.training.rollout_trainer import RolloutTrainer


class UpdateTrainer(RolloutTrainer):
    """What happens between rollouts and the optimiser's step, for a trainer that extends TRL's."""

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The base class's, timed; until a callback is called after a backward, not after a whole step."""
        with self.update.stopwatch.part("student"):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: list[RolloutBatch] | dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Eq. 7 on micro-batches, run inside the wrapper's forward so that DDP and FSDP see it.

        In place of TRL's loss, which is one of next-token probabilities: this is what a trainer is for.
        `inputs` may be rollouts in TRL's form, which are then a window of their own.
        """
        if self.model.training and self._step % self.args.gradient_accumulation_steps == 0:
            self.memory.start()
            self.update.watch.clear()
        if isinstance(inputs, dict):
            rollouts = cast(RolloutInputs, inputs)
            if "representation_weights" not in rollouts:
                rollouts = on_host(rollouts)
                rollouts |= self._row_weights(rollouts)
            inputs = [RolloutBatch.of(rollouts)]
        loss = self._backward_all_but_last(model, inputs)
        return (loss, None) if return_outputs else loss

    def _backward_all_but_last(self, model: torch.nn.Module, parts: list[RolloutBatch]) -> Tensor:
        """The loss of the last micro-batch, plus those of the others, whose gradients are taken here.

        Or their graphs would all be kept until the backward of the caller, which runs one for all of them.
        """
        total = torch.zeros((), device=self.accelerator.device, requires_grad=True)
        for part in parts[:-1]:
            with self._more_to_come(model) as keys:
                loss = self._one_loss(model, part)
                self.accelerator.backward(loss, **keys)
            total = total + loss.detach()
        return total + self._one_loss(model, parts[-1]) if parts else total

    @contextmanager
    def _more_to_come(self, model: torch.nn.Module) -> Iterator[dict[str, Any]]:
        """Inside it a backward is not the step's last: no gradients are exchanged; yields its arguments."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            is_last = self.accelerator.sync_gradients
            self.accelerator.sync_gradients = False  # or the engine would step
            try:
                yield {"scale_wrt_gas": False}  # as the base class has it
            finally:
                self.accelerator.sync_gradients = is_last
            return
        with self.accelerator.no_sync(model) if self.sharding is None else nullcontext():
            yield {}

    def _one_loss(self, model: torch.nn.Module, batch: RolloutBatch) -> Tensor:
        loss = self._through(model, self.update.loss, batch)
        # DDP and FSDP average gradients over ranks; the weights already sum to one over all of them.
        return loss * self.accelerator.num_processes

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, whose metrics go where its own do; until a callback gets what an evaluation step made."""
        result = super().prediction_step(*args, **kwargs)
        self.update.stopwatch.pop()
        self._check_finite()
        for name, value in self.update.averages.pop(self._sum_over_ranks).items():
            self._metrics["eval"][name].append(value)
        return result

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """This step's gradient norm; the run ends before a step whose losses or gradient are not finite.

        Until `on_pre_optimizer_step` tells callbacks the norm.
        """
        self._check_finite()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            self.recorder.grad_norm = float(norm)
            # A gradient scaler, in float16, skips such a step and scales less from then on.
            if self.accelerator.scaler is None and not math.isfinite(self.recorder.grad_norm):
                raise Fault(
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
            raise Fault(f"{where}, in rollouts of {prompts}") from error
