"""What a trainer checks of its arguments, before any model is loaded, and of its student."""

import logging
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from oprd.foundation.errors import UserError
from oprd.models.activation_checkpointing import check_attention_kept
from oprd.models.checks import check_tokenizer
from oprd.models.init_kwargs import check_loaded_teacher
from oprd.models.sharding.zero import check_zero3
from oprd.models.student import has_dropout
from oprd.objective.settings import mapping
from oprd.rollouts.engines.vllm import check_training
from oprd.training.config import OPRDConfig
from oprd.training.installed import check_installed

logger = logging.getLogger(__name__)


def check_arguments(
    args: OPRDConfig, teacher_model: str | PreTrainedModel | None, train_dataset: Any, eval_dataset: Any
) -> str | PreTrainedModel:
    """Raise `UserError` for arguments that no run can begin with; returns the teacher, which is not None."""
    if args.use_vllm:
        check_training(args.vllm_mode, args.vllm_enable_sleep_mode)
    if teacher_model is None:
        raise UserError("no teacher: set teacher_model_name_or_path to a name, a folder or tiny:teacher")
    if not isinstance(train_dataset, (Dataset, IterableDataset)):
        raise UserError(f"train_dataset must be a datasets.Dataset, got {type(train_dataset).__name__}")
    if args.eval_on_start and eval_dataset is None:
        raise UserError("eval_on_start needs an eval_dataset: leave it out, or set accuracy_dataset_name")
    check_installed(args)
    if not isinstance(teacher_model, str):
        check_loaded_teacher(args)
    return teacher_model


def check_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str | None,
    is_vlm: bool,
    args: OPRDConfig,
) -> None:
    """Raise `UserError` for a student that cannot be trained as `args` has it; warn of its dropout."""
    if tokenizer.eos_token_id is None:
        raise UserError("the student's tokenizer has no EOS token, so no rollout would end: set eos_token")
    check_tokenizer(name or "the student", model, tokenizer)
    if is_vlm:
        raise UserError("the student is a vision-language model; oprd distils text-only models so far")
    if args.keep_attention:
        options = mapping("gradient_checkpointing_kwargs", args.gradient_checkpointing_kwargs)
        check_attention_kept(model, args.gradient_checkpointing, options)
    if not args.disable_dropout and has_dropout(model):
        logger.warning("the student learns with dropout, the teacher has none: set disable_dropout: true")
    if is_deepspeed_zero3_enabled():
        check_zero3(model, args)
