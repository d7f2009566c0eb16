"""The vLLM of a training run: what it sampled, how likely it held that, whether its weights are stale."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from oprd.meters import Stopwatch

CHECKED_TOKENS = 32
# Mean |Δ log-prob| in nats over the checked tokens, above which weights and not rounding differ. Two float32
# implementations are 1e-7 to 1e-5 apart, two bfloat16 ones 0.003 (at worst 0.015 in 16 steps of a tiny pair;
# about 0.02 is told of models of many layers); a step at rate 1e-3 that did not arrive is 0.18 or more away.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Drawn:
    """What one call of the engine gave: responses and the log-prob of every token of them."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    log_probs: list[list[float]]

    def padded(self, width: int, device: torch.device) -> Float[Tensor, "B T"]:
        """The log-probs, aligned with responses padded on the right to `width`; zero where there is none."""
        rows = [torch.tensor(row, dtype=torch.float32) for row in self.log_probs]
        padded = pad_sequence([*rows, torch.zeros(width)], batch_first=True)[:-1]
        return padded.to(device)


class StudentEngine:
    """TRL's vLLM generation, with the log-probs of the sampled tokens asked for and kept.

    `drawn` is the first call since it was last taken, `unchecked` whether weights came since the last check.
    The stopwatch counts handing the weights over as "sync".
    """

    def __init__(self, generation: Any, stopwatch: Stopwatch, eos_token_ids: Sequence[int]) -> None:
        generation.logprobs = 0  # of the sampled token alone
        options: dict[str, Any] = {"stop_token_ids": list(eos_token_ids)}
        if generation.mode == "colocate" and "stop" not in generation.generation_kwargs:
            options["detokenize"] = False  # nobody reads the text, and it is 7 % of the time
        generation.generation_kwargs = options | generation.generation_kwargs
        self._generation, self._stopwatch = generation, stopwatch
        self.drawn: Drawn | None = None
        self.unchecked = False

    @property
    def llm(self) -> Any:
        """The colocated `vllm.LLM`."""
        return self._generation.llm

    @property
    def dtype(self) -> torch.dtype | None:
        """What the engine computes in; None if that is a server's business."""
        if self._generation.mode == "server":
            return None
        return self.llm.llm_engine.model_config.dtype

    def sync_weights(self) -> None:
        """Hand the student's weights over, adapters merged into them."""
        with self._stopwatch.part("sync"), _frozen_weights_kept(self._generation.model):
            self._generation.sync_weights()
        self.unchecked = True

    def generate(self, prompts: list[list[int]], **kwargs: Any) -> tuple:
        """TRL's `generate`, whose log-probs are kept."""
        result = self._generation.generate(prompts=prompts, **kwargs)
        _, responses, values, ids = result
        if self.drawn is None:
            self.drawn = Drawn(prompts, responses, _sampled(responses, values, ids))
        return result

    def take(self) -> Drawn:
        """The first call since the last `take`."""
        drawn, self.drawn = self.drawn, None
        assert drawn is not None
        return drawn


@contextmanager
def _frozen_weights_kept(model: nn.Module) -> Iterator[None]:
    """Put back what adapters are merged into and taken out of: it comes out rounded, more at every step."""
    kept = [
        (_local(weight), _local(weight).to("cpu", copy=True))
        for name, weight in model.named_parameters()
        if ".base_layer." in name
    ]
    yield
    for weight, before in kept:
        weight.copy_(before)


def _local(weight: nn.Parameter) -> Tensor:
    """This rank's part of a weight that may be sharded."""
    data = weight.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def check_gap(gap: float, dtypes: Sequence[torch.dtype | None], step: int) -> None:
    """Raise `RuntimeError` if engine and student, computing in `dtypes`, differ more than rounding explains.

    `gap` is the mean |Δ log-prob| in nats; None is a dtype that only a server knows, taken as half precision.
    """
    allowed = max(TOLERANCE.get(dtype or torch.bfloat16, TOLERANCE[torch.float32]) for dtype in dtypes)
    if not gap <= allowed:
        raise RuntimeError(
            f"step {step}: with the weights handed over, vLLM's log-probs of its own tokens differ from the "
            f"student's by {gap:.3g} nats on average (rounding explains {allowed:g}): it does not hold the "
            "student's weights, and its rollouts would not be on-policy; set use_vllm: false, or install a "
            "vLLM version that README.md names"
        )


def _sampled(responses: Any, values: Any, ids: Any) -> list[list[float]]:
    """Of the tokens whose log-probs the engine lists at every position, the sampled one's."""
    return [
        [
            float("nan") if row[at.index(token)] is None else row[at.index(token)]
            for token, row, at in zip(response, rows, listed, strict=True)
        ]
        for response, rows, listed in zip(responses, values, ids, strict=True)
    ]


@torch.no_grad()
def log_prob_gaps(model: Any, drawn: Drawn, device: torch.device) -> Float[Tensor, " n"]:
    """|log π_engine − log π_student| of the first tokens of one response, by one forward of `model`.

    Of the responses that are long enough, it is that of the shortest prompt.
    """
    longest = max(min(len(response), CHECKED_TOKENS) for response in drawn.response_ids)
    able = [i for i, response in enumerate(drawn.response_ids) if len(response) >= longest]
    chosen = min(able, key=lambda i: len(drawn.prompt_ids[i]))
    tokens = torch.tensor(drawn.response_ids[chosen][:longest], device=device)
    prompt = torch.tensor(drawn.prompt_ids[chosen], device=device)
    ids = torch.cat([prompt, tokens[:-1]])[None]
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=longest).logits[0]
    ours = logits[-longest:].float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    theirs = torch.tensor(drawn.log_probs[chosen][:longest], device=device)
    return (ours - theirs).abs()
