"""The LM head of a Hugging Face model as a function of final states, for output losses alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from oprd.foundation.errors import UserError
from oprd.foundation.foreign.accelerate import is_dispatched
from oprd.models.capture import backbone
from oprd.models.loading import weights_are_here
from oprd.models.precision import own_autocast
from oprd.models.sharding.state import whole_tensor

ToLogits = Callable[[Float[Tensor, "n D"]], Float[Tensor, "n V"]]


@dataclass(frozen=True)
class Head:
    """logits = cap · tanh(scale · (W h + b) / cap) over the first `vocabulary` tokens."""

    linear: Any  # an nn.Linear, or what quantisation or adapters put in its place
    scale: float
    softcap: float | None
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module, vocabulary: int) -> "Head":
        """The head of `model`; raises `UserError` if it does not give the model's own logits."""
        causal: Any = model
        config = causal.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        head = cls(causal.get_output_embeddings(), _scale(config), softcap, vocabulary)
        head._check(causal)
        return head

    def __call__(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits in float32 or wider of final, normed states."""
        rows, logits = self.prepared(rows)
        return logits(rows)

    def prepared(self, rows: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D"], ToLogits]:
        """Final states, and the function from any of them to logits, both cast once for many chunks.

        The dtype of the product is that of the autocast which is on here, wherever the function is called.
        """
        if not _is_plain(self.linear):
            return rows, lambda chunk: self.finish(self.linear(chunk)[:, : self.vocabulary])
        rows, weight = self._operands(rows)
        return rows, lambda chunk: self.finish(_product(chunk, weight))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside it the weights are unsharded and at hand on this rank; all ranks have to enter it."""
        linear, sharded = self.linear, {}
        if isinstance(linear, FSDPModule) and isinstance(getattr(linear, "weight", None), DTensor):
            linear.unshard()  # a student's, which the backward reduces
        else:
            own = linear.named_parameters(recurse=False)
            sharded = {name: weight for name, weight in own if isinstance(weight, DTensor)}
        for name, weight in sharded.items():
            linear.register_parameter(name, nn.Parameter(whole_tensor(weight), requires_grad=False))
        try:
            with align_module_device(linear):  # an offloaded one's weights
                yield
        finally:
            for name, weight in sharded.items():
                linear.register_parameter(name, weight)

    def finish(self, product: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """From W h to logits."""
        bias = self.linear.bias if _is_plain(self.linear) else None
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        if bias is not None:
            logits = logits + bias[: self.vocabulary]
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def weighted_loss(
        self,
        loss: Callable[..., Float[Tensor, " n"]],
        rows: Float[Tensor, "N D"],
        others: Sequence[Tensor],
        weights: Float[Tensor, " N"],
        chunk_size: int,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """Σ weights · values, and the values, of `loss(logits, *others)`, `chunk_size` rows at a time.

        A chunk's gradient is taken as soon as its loss is known, so no more logits ever exist, none is made
        twice, and what is kept for the backward is the gradient of `rows` and of the head's weights, summed
        in float32. No gradient passes through the values. The head is a plain linear layer (`check_head`).
        Raises `UserError` for inputs of different lengths.
        """
        _check_chunks(chunk_size, rows, *others, weights)
        assert _is_plain(self.linear)
        inputs = (rows, self.linear.weight, self.linear.bias)
        if not torch.is_grad_enabled():
            inputs = tuple(x if x is None else x.detach() for x in inputs)  # type: ignore[assignment]
        return _WeightedLoss.apply(self, loss, others, weights, chunk_size, *inputs)

    @torch.no_grad()
    def in_chunks(
        self,
        function: Callable[..., Float[Tensor, " n"]],
        rows: Float[Tensor, "N D"],
        others: Sequence[Tensor],
        chunk_size: int,
    ) -> Float[Tensor, " N"]:
        """`function(logits, *others)`, `chunk_size` rows at a time, without gradients; raises `UserError`."""
        _check_chunks(chunk_size, rows, *others)
        rows, logits = self.prepared(rows)
        return torch.cat(
            [function(logits(rows[c]), *(x[c] for x in others)) for c in _chunks(len(rows), chunk_size)]
        )

    def _operands(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States and W, over the shared vocabulary, as they are multiplied."""
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        if dtype is torch.float16 or (kind != "cuda" and dtype is torch.bfloat16):
            # A row's share of the loss is small, and float16 would round it to 0; only CUDA multiplies
            # bfloat16 into float32.
            dtype = torch.float32
        weight = self.linear.weight[: self.vocabulary].to(dtype)
        return rows.to(weight.device, dtype), weight

    @torch.no_grad()
    def _check(self, model: Any) -> None:
        """Compare our logits with the model's once: architectures scale theirs in many ways."""
        if not weights_are_here(model):
            return
        ids = torch.arange(4, device=model.device)[None] % self.vocabulary
        training = model.training
        model.eval()
        with own_autocast(model):
            expected = model(input_ids=ids, use_cache=False).logits[0, :, : self.vocabulary].float()
            states = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
            given = self(states).float()
        model.train(training)
        if (given - expected).abs().max() > 0.05 * expected.abs().max().clamp(min=1):
            raise UserError(
                f"the LM head of {type(model).__name__} applied to its final states does not give its "
                "logits, so output losses would be wrong; use output_loss: none with this model"
            )


def check_head(student: nn.Module, is_trained: bool) -> None:
    """Raise `UserError` for an LM head with adapters; also, if a loss trains it, for no plain linear one."""
    causal: Any = student
    linear, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
    if _is_adapted(embedding) and embedding.weight is linear.weight:
        raise UserError(
            "the student's input embedding has adapters and is tied to its LM head, which would not see them "
            "until they are merged: leave the embedding out of lora_target_modules"
        )
    if is_trained and is_dispatched(linear):
        raise UserError(
            "the student is spread over devices or offloaded, and no output loss would train its LM head "
            "right: start one process for each GPU (torchrun), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    if _is_adapted(linear) or (is_trained and not _is_plain(linear)):
        raise UserError(
            f"the student's LM head is {type(linear).__name__}, and no loss would train it right: leave "
            "lm_head out of lora_target_modules, modules_to_save and quantisation"
        )


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") or hasattr(module, "modules_to_save")


class _WeightedLoss(torch.autograd.Function):
    """A head and a loss on chunks of rows, differentiated in the forward; see `Head.weighted_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        loss: Callable[..., Tensor],
        others: Sequence[Tensor],
        weights: Tensor,
        chunk_size: int,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = (rows, weight, bias)
        gradients = [
            torch.zeros_like(x, dtype=_wide(x.dtype)) if x is not None and wanted else None
            for x, wanted in zip(inputs, ctx.needs_input_grad[-3:], strict=True)
        ]
        states, used = head._operands(rows)
        total, values = torch.zeros((), dtype=_wide(rows.dtype), device=rows.device), []
        with torch.autocast(rows.device.type, enabled=False):
            for chunk in _chunks(len(rows), chunk_size):
                product = _product(states[chunk], used).requires_grad_()
                with torch.enable_grad():
                    value = loss(head.finish(product), *(x[chunk] for x in others))
                    here = (value * weights[chunk].to(value)).sum()
                total += here.detach()
                values.append(value.detach())
                if any(gradient is not None for gradient in gradients):
                    (slope,) = torch.autograd.grad(here, product)
                    _accumulate(gradients, chunk, slope, states[chunk], used)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.gradients = [
            gradient if gradient is None or dtype is torch.float16 else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        result = torch.cat(values)
        ctx.mark_non_differentiable(result)
        return total, result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of a chunked output loss can be taken once only")
        scaled = zip(gradients, ctx.dtypes, strict=True)  # float16 is large enough once the loss was scaled
        return *(None,) * 5, *(None if x is None else x.mul_(grads[0]).to(dtype) for x, dtype in scaled)


def _accumulate(
    gradients: Sequence[Tensor | None], chunk: slice, slope: Tensor, states: Tensor, weight: Tensor
) -> None:
    """Add a chunk's gradient with respect to W h to the gradients of rows, W and bias."""
    rows, of_weight, of_bias = gradients
    vocabulary = len(weight)
    half = slope.to(weight.dtype)
    if rows is not None:
        rows[chunk] = _product(half, weight.T)
    if of_weight is not None:
        _add_product(of_weight[:vocabulary], half.T, states)
    if of_bias is not None:
        of_bias[:vocabulary] += slope.sum(0)


def _check_chunks(chunk_size: int, *rows: Tensor) -> None:
    if chunk_size < 1:
        raise UserError(f"chunk_size must be 1 or more, got {chunk_size}")
    lengths = [len(x) for x in rows]
    if len(set(lengths)) > 1:
        raise UserError(f"{lengths} rows do not pair up: they must be those of the same positions")


def _chunks(num_rows: int, size: int) -> list[slice]:
    """Consecutive slices of `size` rows; an empty one where there are no rows."""
    return [slice(i, i + size) for i in range(0, max(num_rows, 1), size)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product(rows: Float[Tensor, "N D"], weight: Float[Tensor, "V D"]) -> Float[Tensor, "N V"]:
    """rows · Wᵀ in float32 or wider: logits are never rounded to half precision."""
    if rows.dtype is torch.bfloat16:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return rows @ weight.T


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, without rounding the product to half precision."""
    if a.dtype is torch.bfloat16:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a head's weights are at hand: not quantised, adapted or offloaded now; they may be sharded."""
    return type(linear).forward is nn.Linear.forward and not linear.weight.is_meta


def _scale(config: Any) -> float:
    """The multiplier between W h and the logits, under the names that architectures give it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
