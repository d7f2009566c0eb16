"""Two tokens sampled from the student before the first rollout, to find a model that cannot be sampled."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.models.loading import weights_are_here
from oprd.models.trial import texts, told_of_architecture
from oprd.rollouts.generation import Sampling, generate


def try_rollout(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sample two tokens; raises `UserError` where the student cannot be generated from."""
    if weights_are_here(model):
        with told_of_architecture("student", model):
            generate(model, tokenizer, texts(model).tolist(), Sampling(2), seed=0)
