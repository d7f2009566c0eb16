"""Does an engine hold the student's weights? Two checks of log-probs after a weight sync.

After every sync, on a few tokens that the engine has just sampled: it detects other weights if the difference
is larger than rounding. After every eighth, on a text that stays the same: an engine that gets no weights
returns the same log-probs to the bit while the student's change. That detects it a hundred times earlier.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from jaxtyping import Float
from torch import Tensor

from oprd.foundation.errors import Fault
from oprd.rollouts.engines.student import Drawn, StudentEngine

CHECKED_TOKENS = 32
READ_AGAIN_EVERY = 8
# Mean |Δ log-prob| in nats over the checked tokens, above which weights and not rounding differ. Two float32
# implementations are 1e-7 to 1e-5 apart, two bfloat16 ones 0.003 (at worst 0.015 in 16 steps of a tiny pair;
# about 0.02 is reported for deep models); a step at rate 1e-3 that did not arrive is 0.18 or more away.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# The share of it by which a student may move while its engine returns the same log-probs to the bit. Weights
# that arrive change some bit of some log-prob long before, even where most of them round to what they were.
UNMOVED = 0.01
_STALE = (
    "it does not hold the student's weights, and its rollouts would not be on-policy; set use_vllm: false, "
    "or install a vLLM version that docs/quickstart.md names"
)


class FixedText:
    """A text of the first rollouts, which engine and student read again every few weight syncs."""

    def __init__(self) -> None:
        self._text: tuple[list[int], list[int]] | None = None
        self._hand_overs = 0
        self._engine: list[float] | None = None
        self._student = torch.empty(0)

    def moved_alone(self, engine: StudentEngine, model: Any, drawn: Drawn, device: torch.device) -> float:
        """Nats that the student has moved since the engine last did; all ranks ask together."""
        self._hand_overs += 1
        if self._hand_overs % READ_AGAIN_EVERY or not engine.is_awake:
            return 0.0
        if self._text is None:  # the first rank's for all: ranks may share an engine
            prompt, response, _ = _first_tokens(drawn)
            self._text = broadcast_object_list([(prompt, response[:-1])])[0]
        prompt, response = self._text
        if not response:
            return 0.0
        told, student = engine.score(prompt, response), student_log_probs(model, prompt, response, device)
        if told != self._engine:
            self._engine, self._student = told, student
        return (student - self._student).abs().mean().item()


def check_gap(gap: float, dtypes: Sequence[torch.dtype | None], step: int) -> None:
    """Raise `Fault` if engine and student, computing in `dtypes`, differ more than rounding explains.

    `gap` is the mean |Δ log-prob| in nats; None is a dtype that only a server knows, taken as half precision.
    """
    allowed = _tolerance(dtypes)
    if not gap <= allowed:
        raise Fault(
            f"step {step}: after the weight sync, vLLM's log-probs of its own tokens differ from the "
            f"student's by {gap:.3g} nats on average (rounding explains {allowed:g}): {_STALE}"
        )


def check_moved_alone(moved: float, dtypes: Sequence[torch.dtype | None], step: int) -> None:
    """Raise `Fault` if the student moved by `moved` nats while its engine did not move at all."""
    if not moved <= UNMOVED * _tolerance(dtypes):
        raise Fault(
            f"step {step}: the student's log-probs of a text have moved by {moved:.3g} nats on average, and "
            f"vLLM's, after the weight sync, have not moved at all: {_STALE}"
        )


def log_prob_gaps(model: Any, drawn: Drawn, device: torch.device) -> Float[Tensor, " n"]:
    """|log π_engine − log π_student| of the first tokens of one response, by one forward of `model`.

    Of the responses that are long enough, it is that of the shortest prompt.
    """
    prompt, response, told = _first_tokens(drawn)
    return (student_log_probs(model, prompt, response, device) - torch.tensor(told, device=device)).abs()


@torch.no_grad()
def student_log_probs(
    model: Any, prompt: list[int], response: list[int], device: torch.device
) -> Float[Tensor, " n"]:
    """The log-probs of a text's response, by one forward of `model`."""
    tokens = torch.tensor(response, device=device)
    ids = torch.tensor(prompt + response[:-1], device=device)[None]
    mask = torch.ones_like(ids)
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=len(response))
    logits = output.logits[0]
    return logits[-len(response) :].float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def _first_tokens(drawn: Drawn) -> tuple[list[int], list[int], list[float]]:
    longest = max(min(len(response), CHECKED_TOKENS) for response in drawn.response_ids)
    able = [i for i, response in enumerate(drawn.response_ids) if len(response) >= longest]
    chosen = min(able, key=lambda i: len(drawn.prompt_ids[i]))
    return drawn.prompt_ids[chosen], drawn.response_ids[chosen][:longest], drawn.log_probs[chosen][:longest]


def _tolerance(dtypes: Sequence[torch.dtype | None]) -> float:
    return max(TOLERANCE.get(dtype or torch.bfloat16, TOLERANCE[torch.float32]) for dtype in dtypes)
