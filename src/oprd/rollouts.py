"""Generation outside training: the rollouts that the bridge is fitted on and the evaluation grades."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from oprd.errors import UserError
from oprd.ranges import EVALUATION_RANGES, check_ranges


@dataclass(frozen=True)
class Sampling:
    """The distribution that responses are drawn from.

    `temperature` 0 is greedy decoding, `top_k` 0 and `top_p` 1 switch these cuts off, and
    `max_new_tokens` counts the EOS. Raises `UserError` for a value outside its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0

    def __post_init__(self) -> None:
        check_ranges(vars(self), EVALUATION_RANGES)


@dataclass(frozen=True)
class Rollout:
    """One response: its token ids include the EOS; `truncated` means that none came within the limit."""

    prompt_ids: list[int]
    response_ids: list[int]
    truncated: bool


class Engine(Protocol):
    """Draws responses outside training. `name` tells engines apart whose samples differ."""

    @property
    def name(self) -> str:
        """What stands in the settings of a folder."""

    def generate(self, prompt_ids: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        """One response per prompt; `sampling` and `seed` decide it as far as the engine allows."""
        ...


@dataclass(frozen=True)
class HFEngine:
    """`generate` of a model that is at hand."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "hf"

    def generate(self, prompt_ids: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        """One response per prompt, exactly determined."""
        return generate(self.model, self.tokenizer, prompt_ids, sampling, seed)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the tokenizer's EOS, then those of the model's generation config.

    Raises `UserError` when there is none.
    """
    listed = getattr(model.generation_config, "eos_token_id", None)
    others = listed if isinstance(listed, list) else [listed]
    ids = [i for i in [tokenizer.eos_token_id, *others] if i is not None]
    if not ids:
        raise UserError(
            "neither the tokenizer nor the model's generation config names an EOS token, so no response "
            "would ever end: set eos_token in the tokenizer's files"
        )
    return list(dict.fromkeys(ids))


def left_pad(prompts: Sequence[list[int]], pad_id: int) -> tuple[Int[Tensor, "B P"], Int[Tensor, "B P"]]:
    """Prompts of token ids as one left-padded tensor, and its mask."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    mask = [torch.ones_like(prompt) for prompt in ids]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left"),
        pad_sequence(mask, batch_first=True, padding_side="left"),
    )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    sampling: Sampling,
    seed: int | Sequence[int],
) -> list[Rollout]:
    """One response per prompt, drawn in one left-padded batch with HF `generate`.

    Nothing but the model, the batch, `sampling` and `seed` decides the result: the sampling options in
    the model's own generation config are set aside, and the global random state is neither read nor
    changed. With a seed per prompt the batch, too, decides no more than rounding. The model's train/eval
    modes are restored. Raises `UserError` without an EOS token.
    """
    eos = eos_token_ids(model, tokenizer)
    pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = left_pad(prompt_ids, pad)
    draws = LogitsProcessorList()
    if not isinstance(seed, int) and sampling.temperature:
        draws.append(OwnDraws(sampling, seed, model.device))
        sampling = replace(sampling, temperature=0)  # of what was drawn, `generate` takes the likeliest
    with _seeded(seed if isinstance(seed, int) else 0), eval_mode(model), _blank_generation_config(model):
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=_generation_config(sampling, eos, pad),
            logits_processor=draws,
        )
    responses = output[:, ids.shape[1] :].tolist()
    return [cut_at_eos(p, r, eos) for p, r in zip(prompt_ids, responses, strict=True)]


def _generation_config(sampling: Sampling, eos: list[int], pad: int) -> GenerationConfig:
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=eos,
        pad_token_id=pad,
        use_cache=True,
        **(drawn if sampling.temperature > 0 else {}),
    )


def warpers(temperature: float, top_k: int, top_p: float, min_p: float | None = None) -> LogitsProcessorList:
    """The cuts that `generate` samples under."""
    cuts = LogitsProcessorList()
    if temperature != 1:
        cuts.append(TemperatureLogitsWarper(temperature))
    if top_k:
        cuts.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        cuts.append(TopPLogitsWarper(top_p))
    if min_p:
        cuts.append(MinPLogitsWarper(min_p))
    return cuts


class OwnDraws(LogitsProcessor):
    """Samples every row's token from random numbers of its own, and leaves greedy decoding no other."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        self._cuts = warpers(sampling.temperature, sampling.top_k, sampling.top_p)
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        likely = self._cuts(input_ids, scores).softmax(-1)
        rows = zip(likely, self._generators, strict=True)
        drawn = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def cut_at_eos(prompt_ids: list[int], response_ids: list[int], eos: Sequence[int]) -> Rollout:
    """A response up to its first EOS, which pads may equal."""
    end = next((i for i, token in enumerate(response_ids) if token in eos), None)
    if end is None:
        return Rollout(prompt_ids, response_ids, truncated=True)
    return Rollout(prompt_ids, response_ids[: end + 1], truncated=False)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluate within the block; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _blank_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """HF fills every unset option from the model's generation config, so that one is swapped out."""
    owner = getattr(model, "get_base_model", lambda: model)()
    kept = owner.generation_config
    owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = kept
