"""Which ids end a response: one answer for training, evaluation, the bridge and alignment."""

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from oprd.foundation.errors import UserError
from oprd.text.spelling import end_of_turn


def eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *configs: GenerationConfig
) -> list[int]:
    """The ids that end a response, in training, evaluation, bridge and alignment alike.

    They are the tokenizer's EOS, all that the model's generation config lists (and `configs`, if given), and
    the end of turn of the chat template. Raises `UserError` when the first two name none.
    """
    if not listed_eos_ids(model, tokenizer, *configs):
        raise UserError(
            "neither the tokenizer nor the model's generation config names an EOS token, so no response "
            "would ever end: set eos_token in the tokenizer's files"
        )
    return all_ends(model, tokenizer, *configs)


def all_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *configs: GenerationConfig
) -> list[int]:
    """`eos_token_ids`, which may be none."""
    return _known([*listed_eos_ids(model, tokenizer, *configs), end_of_turn(tokenizer)])


def listed_eos_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *configs: GenerationConfig
) -> list[int]:
    """The tokenizer's EOS and what the generation configs list: what a saved model stops at."""
    ids: list[int | None] = [tokenizer.eos_token_id]
    for config in (model.generation_config, *configs):
        listed = getattr(config, "eos_token_id", None)
        ids += listed if isinstance(listed, list) else [listed]
    return _known(ids)


def _known(ids: list[int | None]) -> list[int]:
    return list(dict.fromkeys(i for i in ids if i is not None))
