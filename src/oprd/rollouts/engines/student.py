"""The vLLM of a training run: handed the student's weights, asked for rollouts and for log-probs of texts."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from oprd.foundation.meters import Stopwatch


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
        self._hand_over, generation.sync_weights = generation.sync_weights, self.sync_weights
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
            self._hand_over()
        self.unchecked = True

    def generate(self, prompts: list[list[int]], **kwargs: Any) -> tuple:
        """TRL's `generate`, whose log-probs are kept."""
        result = self._generation.generate(prompts=prompts, **kwargs)
        _, responses, values, ids = result
        if self.drawn is None:
            self.drawn = Drawn(prompts, responses, _sampled(responses, values, ids))
        return result

    @property
    def is_awake(self) -> bool:
        """Whether it has weights between rollouts: asleep they are thrown away, and come anew."""
        return self._generation.mode == "server" or not self._generation.enable_sleep_mode

    def score(self, prompt: list[int], response: list[int]) -> list[float]:
        """The log-probs of a text's response; a server is asked by the first rank for all of them."""
        if self._generation.mode == "server":
            told = (
                [self._ask_server(prompt, response)] if self._generation.accelerator.is_main_process else [[]]
            )
            return broadcast_object_list(told)[0]
        greedy = importlib.import_module("vllm").SamplingParams(  # takes no random number from the rollouts
            temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False
        )
        (output,) = self.llm.generate([{"prompt_token_ids": prompt + response}], greedy, use_tqdm=False)
        listed = output.prompt_logprobs[len(prompt) :]
        return [at[token].logprob for token, at in zip(response, listed, strict=True)]

    def _ask_server(self, prompt: list[int], response: list[int]) -> list[float]:
        scores = self._generation.vllm_client.get_sequence_logprobs(
            [prompt + response], [len(prompt)], top_logprobs=1
        )
        return [value for (value,) in scores["actual_logprobs"][0]]

    def take(self) -> Drawn:
        """The first call since the last `take`."""
        drawn, self.drawn = self.drawn, None
        assert drawn is not None
        return drawn


@contextmanager
def _frozen_weights_kept(model: nn.Module) -> Iterator[None]:
    """Put back what adapters are merged into and taken out of: it comes out rounded, more at every step.

    A weight's storage may be another one afterwards (DoRA).
    """
    kept = [
        (weight, _local(weight).to("cpu", copy=True))
        for name, weight in model.named_parameters()
        if ".base_layer." in name
    ]
    yield
    for weight, before in kept:
        _local(weight).copy_(before)


def _local(weight: nn.Parameter) -> Tensor:
    """This rank's part of a weight that may be sharded."""
    data = weight.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def _sampled(responses: Any, values: Any, ids: Any) -> list[list[float]]:
    """Of the tokens whose log-probs the engine lists at every position, the sampled one's."""
    return [
        [
            float("nan") if row[at.index(token)] is None else row[at.index(token)]
            for token, row, at in zip(response, rows, listed, strict=True)
        ]
        for response, rows, listed in zip(responses, values, ids, strict=True)
    ]
