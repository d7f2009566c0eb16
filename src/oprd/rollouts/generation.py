"""Generation outside training: the rollouts that the bridge is fitted on and the evaluation grades."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
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

from oprd.foundation.ranges import EVALUATION_RANGES, check_ranges
from oprd.models.eos import eos_token_ids
from oprd.models.finite import finite_logits
from oprd.models.generation_config import generation_config_aside
from oprd.models.loading import eval_mode
from oprd.models.padding import generation_batches, in_batches

LIKELIEST = 512  # tokens among which top-p looks first


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

    @property
    def text_ids(self) -> list[int]:
        """The response without the token that ended it, which need not be a special one."""
        return self.response_ids if self.truncated else self.response_ids[:-1]


class Engine(Protocol):
    """Draws responses outside training. Engines whose samples differ have different `name`s."""

    @property
    def name(self) -> str:
        """What the settings of a folder record."""

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
    """One response per prompt, drawn with HF `generate` in one left-padded batch.

    A model whose rollouts a batch would change gets several (`generation_batches`).

    Nothing but the model, the batch, `sampling` and `seed` decides the result: the sampling options in
    the model's own generation config are set aside, and the global random state is neither read nor
    changed. With a seed per prompt the batch, too, decides no more than rounding. The model's train/eval
    modes are restored. Raises `UserError` without an EOS token, and `RuntimeError` for logits that are not
    finite.
    """
    eos = eos_token_ids(model, tokenizer)
    pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    seeds = None if isinstance(seed, int) or not sampling.temperature else list(seed)
    # Of what was drawn from seeds of their own, `generate` takes the likeliest.
    options = _generation_config(sampling if seeds is None else replace(sampling, temperature=0), eos, pad)

    generator: Any = model  # transformers types `generate` for single architectures alone

    def draw(batch: Sequence[int]) -> list[Rollout]:
        prompts = [prompt_ids[i] for i in batch]
        ids, mask = left_pad(prompts, pad)
        own = [OwnDraws(sampling, [seeds[i] for i in batch], model.device)] if seeds else []
        output = generator.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=options,
            logits_processor=LogitsProcessorList(own),
        )
        responses = output[:, ids.shape[1] :].tolist()
        return [cut_at_eos(p, r, eos) for p, r in zip(prompts, responses, strict=True)]

    with (
        _seeded(seed if isinstance(seed, int) else 0),
        eval_mode(model),
        generation_config_aside(model),
        finite_logits(model, "the model"),
    ):
        return in_batches(generation_batches(model, prompt_ids), draw)


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
        self._sampling = sampling
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        tokens, shares = candidates(scores, self._sampling)
        reached = shares.cumsum(-1)
        drawn = [torch.rand(1, generator=g, device=scores.device) for g in self._generators]
        # The first candidate up to which more is reached than drawn, and never one without a share.
        wanted = torch.stack(drawn).to(reached) * reached[:, -1:]
        place = torch.searchsorted(reached, wanted, right=True)
        last = reached.shape[-1] - 1 - (shares.flip(-1) > 0).int().argmax(-1, keepdim=True)
        token = tokens.gather(-1, place.minimum(last))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def candidates(
    scores: Float[Tensor, "B V"], sampling: Sampling
) -> tuple[Int[Tensor, "B C"], Float[Tensor, "B C"]]:
    """Tokens, and their shares of what the cuts of `sampling` leave; 0 for those that they take away.

    As `warpers` have it, but for the sort of a whole vocabulary: top-p takes its tokens from the likeliest
    `LIKELIEST`, as long as these are enough.
    """
    scores = scores / sampling.temperature
    size = scores.shape[-1]
    if sampling.top_p == 1 and not sampling.top_k:
        return torch.arange(size, device=scores.device).expand_as(scores), scores.softmax(-1)
    values, tokens = scores.topk(min(size, sampling.top_k or LIKELIEST), dim=-1)
    whole = (values if sampling.top_k else scores).logsumexp(-1, keepdim=True)
    if not sampling.top_k and (values.logsumexp(-1, keepdim=True) - whole).exp().min() < sampling.top_p:
        values, tokens = scores.sort(dim=-1, descending=True)
    shares = (values - whole).exp()
    above = shares.cumsum(-1) - shares
    return tokens, shares * (above < sampling.top_p)


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
