"""Whether a model has all its weights from its files, and whether its tokenizer, ids and adapters fit it."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.foundation.errors import UserError
from oprd.foundation.foreign.transformers import load_report_kept
from oprd.models.files import stored_types

logger = logging.getLogger(__name__)

SHOWN = 3
NO_ID = 2**63
FLOATS = ("float64", "float32", "float16", "bfloat16")


def check_weights(name: str, model: PreTrainedModel, found: Mapping[str, Any], folder: Path | None) -> None:
    """Raise `UserError` for weights that the files lack, or hold as something else than real numbers.

    `found` is what `from_pretrained` reports of loading; a weight that it filled in would be random.
    """
    where = folder or name
    missing, others = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} of the model's {len(model.state_dict())} weights, which would be "
            f"drawn at random: {_some(missing)}{_hint(missing, others)}"
        )
    if others:
        logger.warning("%s holds %d weights that the model has not: %s", where, len(others), _some(others))
    if folder is not None and not getattr(model, "is_quantized", False):
        _check_types(model, folder)


def check_adapters(name: str, model: Any, result: Any) -> None:
    """Raise `UserError` unless the file of adapters held those of this model and no others.

    `result` is what peft's `load_adapter` returns.
    """
    missing = sorted(key.replace(".default.", ".") for key in result.missing_keys)  # files name no adapter
    others = sorted(result.unexpected_keys)
    if missing:
        raise UserError(
            f"the adapters in {name} lack {len(missing)} weights, which would be drawn at random: "
            f"{_some(missing)}{_hint(missing, others)}"
        )
    if others:
        raise UserError(
            f"the adapters in {name} are of another model than {model.config.name_or_path}, which has no "
            f"place for {_some(others)}: check base_model_name_or_path in adapter_config.json"
        )


def check_ids(name: str, model: PreTrainedModel) -> None:
    """Raise `UserError` for special tokens of the generation config that are no ids."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.generation_config, key, None)
        ids = value if isinstance(value, list) else [value]
        if not all(i is None or (type(i) is int and abs(i) < NO_ID) for i in ids):
            raise UserError(f"{name}: generation_config.json has {key}: {value!r}, which is no token id")


def check_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` if ordinary text or a chat may become ids that the model has no embedding for.

    Special tokens that only their own spelling gives may lie beyond (Gemma 3's for images do).
    """
    size = num_embeddings(model)
    if max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder, 0) < size:
        return
    special = set(tokenizer.all_special_tokens)
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = {str(t) for t in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if t is not None}
    used |= set(tokenizer.convert_ids_to_tokens(tokenizer("0")["input_ids"]))
    if isinstance(tokenizer.chat_template, str):
        used |= {token for token in special if token in tokenizer.chat_template}
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= size}
    if wrong := sorted(beyond[token] for token in beyond if token not in special or token in used):
        token = tokenizer.convert_ids_to_tokens(wrong[0])
        raise UserError(
            f"the tokenizer of {name} gives {len(wrong)} ids that the model has no embedding for, such as "
            f"{wrong[0]} for {token!r}; it has {size}: use the model's own tokenizer, or resize the model's "
            "embeddings (resize_token_embeddings) and train them"
        )


def num_embeddings(model: Any) -> int:
    """How many ids a model has embeddings for, padding included."""
    embedding = model.get_input_embeddings()
    return getattr(embedding, "base_layer", embedding).num_embeddings  # adapters wrap theirs


def try_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer read a word, and its chat template a turn; raises whatever damaged files cause.

    Whether the template takes the turns of a dataset is for its rows to tell.
    """
    tokenizer("0")
    if tokenizer.chat_template:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "0"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise ValueError(f"its chat template is no Jinja ({error})") from error
        except Exception as error:
            logger.debug("a chat template refuses a single turn: %s", error)


@contextmanager
def loading_reported(name: str) -> Iterator[None]:
    """Within it an error of loading that refers to transformers' table in the log says what stands there."""
    with load_report_kept() as rows:
        try:
            yield
        except RuntimeError as error:
            if not rows:
                raise
            what = f"{rows[0]}{_others(len(rows))}"
            raise UserError(f"the weights in {name} do not fit its config.json: {what}") from error


def _check_types(model: PreTrainedModel, folder: Path) -> None:
    wanted = {key for key, weight in model.named_parameters() if weight.is_floating_point()}
    for path in sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        types = stored_types(path)
        if odd := sorted(key for key in types.keys() & wanted if types[key] not in FLOATS):
            raise UserError(
                f"{path} holds {odd[0]} as {types[odd[0]]}{_others(len(odd))}, and config.json names no "
                f"quantisation that says what it means: load a checkpoint of {', '.join(FLOATS[1:])}"
            )


def _hint(missing: list[str], others: list[str]) -> str:
    """What the files hold instead of the weights that are missing."""
    if not others:
        return ""
    for other in others:
        for key in missing:
            if other.endswith(f".{key}"):
                return f"; the files' names carry the prefix {other.removesuffix(key)!r}: save it without"
            if key.endswith(f".{other}"):
                return f"; the files' names lack the prefix {key.removesuffix(other)!r}"
    return f"; the files hold {len(others)} others, such as {others[0]}: is the config another model's?"


def _some(keys: Collection[str]) -> str:
    shown = ", ".join(list(keys)[:SHOWN])
    return f"{shown}, …" if len(keys) > SHOWN else shown


def _others(count: int) -> str:
    return f" (and {count - 1} others like it)" if count > 1 else ""
