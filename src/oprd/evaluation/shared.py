"""An evaluation that the ranks of a training run share: one result, however many they are.

Every response is drawn from random numbers of its own, so that it matters to none which rank draws it, and
which others with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.evaluation import metrics
from oprd.evaluation.evaluate import derived_seed, graded
from oprd.evaluation.problems import EvalSettings, check_context, read_problems
from oprd.rollouts.generation import generate


def evaluate_on_ranks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    settings: EvalSettings,
) -> dict[str, float]:
    """`avg_at_k`, `ci95_…`, `best_at_k`, `mean_length` and `no_answer_share` of `rows`, on every rank.

    All ranks have to call it.

    A rank draws its part of the responses, at most `settings.batch_size` at a time. All ranks generate
    equally often, since models that DeepSpeed partitions run on all of them together.
    """
    problems, size = read_problems(model, tokenizer, rows, settings), settings.batch_size
    check_context(model, problems, settings.sampling.max_new_tokens)
    wanted = [(i, sample) for i in range(len(problems)) for sample in range(settings.samples)]
    drawn = []
    with PartialState().split_between_processes(wanted, apply_padding=True) as mine:
        for start in range(0, len(mine), size):
            batch = mine[start : start + size]
            prompts = [problems[i].prompt_ids for i, _ in batch]
            seeds = [derived_seed(settings.seed, *response) for response in batch]
            rollouts = generate(model, tokenizer, prompts, settings.sampling, seeds)
            for response, rollout in zip(batch, rollouts, strict=True):
                drawn.append((response, graded(tokenizer, rollout, problems[response[0]].reference)))
    found = dict(gather_object(drawn))
    numbers = range(settings.samples)
    summary = metrics.summarize([{"samples": [found[i, n] for n in numbers]} for i in range(len(problems))])
    low, high = summary["ci95"]
    others = {name: summary[name] for name in ("best_at_k", "mean_length", "no_answer_share")}
    return {"avg_at_k": summary["avg_at_k"], "ci95_low": low, "ci95_high": high, **others}
