"""vLLM outside training: in this process, or a server that is asked over HTTP; and which engine is used."""

import importlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.foundation.errors import Fault, UserError, reason, whatever_fails_is
from oprd.models.eos import eos_token_ids
from oprd.models.loading import holds_adapters
from oprd.rollouts.engines.staleness import CHECKED_TOKENS, log_prob_gaps
from oprd.rollouts.engines.student import Drawn
from oprd.rollouts.engines.vllm import INSTALL, is_installed, make_llm
from oprd.rollouts.generation import Engine, HFEngine, Rollout, Sampling, cut_at_eos

ENGINES = ("auto", "hf", "vllm")
REQUESTS_AT_A_TIME = 64
ANSWER_SECONDS = 10
# A server that answers later than these allow has died: it would be slower than a laptop's processor.
FIRST_TOKEN_SECONDS = 120
TOKENS_A_SECOND = 10  # of all the requests together
# Mean |Δ log-prob| in nats over prompt tokens, which are improbable: bfloat16 against float32 is 0.06 of the
# tiny pair, one of its models against the other 6.
OTHER_MODEL = 0.25


def choose_engine(
    kind: str,
    url: str | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    memory_share: float = 0.9,
    hub_kwargs: Mapping[str, Any] | None = None,
) -> Engine:
    """The engine of a command: `auto` is vLLM where it is installed or a server's `url` is given, else HF.

    `folder` is where vLLM loads `model` from, with `hub_kwargs`, and `memory_share` what it may take of an
    accelerator; `auto` leaves folders of adapters to HF. Raises `UserError` for a server that does not
    answer and where vLLM is asked for and missing.
    """
    eos = eos_token_ids(model, tokenizer)
    if url is not None:
        if kind == "hf":
            raise UserError("engine: hf, and vllm_server_base_url names a server: drop one of them")
        return ServerEngine(url, model, eos)
    if kind == "hf" or (kind == "auto" and (not is_installed() or holds_adapters(folder))):
        return HFEngine(model, tokenizer)
    if not is_installed():
        raise UserError(f"engine: vllm, but there is no vLLM: {INSTALL}, or use engine: hf")
    if holds_adapters(folder):
        raise UserError(f"engine: vllm loads no adapters, and {folder} holds some: name its folder merged")
    return VLLMEngine(folder, model.dtype, eos, memory_share, hub_kwargs or {})


class VLLMEngine:
    """A vLLM of its own in this process, started when it is first asked."""

    name = "vllm"

    def __init__(
        self,
        folder: str,
        dtype: torch.dtype,
        eos: Sequence[int],
        memory_share: float,
        hub_kwargs: Mapping[str, Any],
    ) -> None:
        self._folder, self._dtype, self._eos, self._share = folder, dtype, eos, memory_share
        self._hub_kwargs = {**hub_kwargs, "tokenizer_revision": hub_kwargs.get("revision")}

    @cached_property
    def _llm(self) -> Any:
        return make_llm(
            model=self._folder,
            # Left to itself vLLM computes float32 models in half precision.
            dtype=str(self._dtype).removeprefix("torch."),
            max_model_len=-1,  # as long as memory allows
            gpu_memory_utilization=self._share,
            **self._hub_kwargs,
        )

    def generate(self, prompt_ids: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        """One response per prompt; every request has a seed of its own."""
        params = importlib.import_module("vllm").SamplingParams
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompt_ids],
            [
                params(detokenize=False, **_request(sampling, self._eos, seed + i))
                for i in range(len(prompt_ids))
            ],
            use_tqdm=False,
        )
        responses = [list(output.outputs[0].token_ids) for output in outputs]
        return [cut_at_eos(p, r, self._eos) for p, r in zip(prompt_ids, responses, strict=True)]


class ServerEngine:
    """A server of `vllm serve`, one request per response; raises `UserError` where none answers.

    Before the first response, its log-probs of a few tokens show whether it serves the weights of `model`.
    """

    name = "vllm server"

    def __init__(self, url: str, model: PreTrainedModel, eos: Sequence[int]) -> None:
        self._url, self._model, self._eos = url.rstrip("/"), model, eos
        self._served = self._name()
        self._is_checked = False

    def _name(self) -> str:
        """What the server calls the model that it serves; raises `UserError` if it is none of vLLM's."""
        with whatever_fails_is(
            lambda error: f"{self._url} is no vLLM server ({reason(error)}): start vllm serve MODEL"
        ):
            return self._ask("/v1/models", None, ANSWER_SECONDS)["data"][0]["id"]

    def generate(self, prompt_ids: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        """One response per prompt; raises `UserError` for a server of other weights."""
        if not self._is_checked:
            self._check(prompt_ids[0])
        bodies = [
            {"prompt": ids, **_request(sampling, self._eos, seed + i)} for i, ids in enumerate(prompt_ids)
        ]
        together = min(REQUESTS_AT_A_TIME, len(bodies))
        patience = FIRST_TOKEN_SECONDS + together * sampling.max_new_tokens / TOKENS_A_SECOND
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as threads:
            choices = list(threads.map(lambda body: self._complete(body, patience), bodies))
        return [
            cut_at_eos(ids, choice["token_ids"], self._eos)
            for ids, choice in zip(prompt_ids, choices, strict=True)
        ]

    def _check(self, prompt_ids: list[int]) -> None:
        # Log-probs of what the model did not write itself: models of one task hold the same of their answers.
        ids = (prompt_ids * 2)[: CHECKED_TOKENS + 1]
        body = {"prompt": ids, "prompt_logprobs": 0, "max_tokens": 1}
        choice = self._complete(body, FIRST_TOKEN_SECONDS)
        told = [
            at[str(token)]["logprob"]
            for token, at in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
        ]
        drawn = Drawn([ids[:1]], [ids[1:]], [told])
        gap = log_prob_gaps(self._model, drawn, self._model.device).mean().item()
        if not gap <= OTHER_MODEL:
            raise UserError(
                f"the server at {self._url} serves {self._served}, and its log-probs differ from the model's "
                f"by {gap:.3g} nats on average: start it with the model that is asked for"
            )
        self._is_checked = True

    def _complete(self, body: dict[str, Any], patience: float) -> dict[str, Any]:
        body = {"model": self._served, "return_token_ids": True, **body}
        return self._ask("/v1/completions", body, patience)["choices"][0]

    def _ask(self, path: str, body: dict[str, Any] | None, patience: float) -> Any:
        """The server's answer, waited for `patience` seconds; raises `UserError` where none comes."""
        try:
            data = None if body is None else json.dumps(body).encode()
            request = Request(self._url + path, data, {"Content-Type": "application/json"})
            with urlopen(request, timeout=patience) as answer:
                return json.load(answer)
        except HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise Fault(f"the server at {self._url} refused {path}: {error}: {said}") from error
        except TimeoutError as error:
            raise UserError(
                f"the server at {self._url} has not answered {path} for {patience:.0f} s: see what it says "
                "itself, and start it again"
            ) from error
        except (URLError, HTTPException, OSError, ValueError) as error:
            raise UserError(
                f"no vLLM server answers at {self._url} ({error}): start one with vllm serve MODEL, or leave "
                "vllm_server_base_url out"
            ) from error


def _request(sampling: Sampling, eos: Sequence[int], seed: int) -> dict[str, Any]:
    """What vLLM is asked for, with nothing left to the defaults of the model's own generation config."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(eos),
        "seed": seed,
    }
