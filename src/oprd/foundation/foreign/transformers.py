"""What we use of transformers that it keeps private, or that it tells in its log alone.

Imports the library where a function needs more of it than an attribute of a model.
"""

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
ANSI_STYLE = re.compile(r"\x1b\[[0-9;]*m")
SHAPES = re.compile(r"(\S+(?: \S+)*?) \|.*torch\.Size\((.*)\) vs model: ?torch\.Size\((.*)\)")
NO_FIT = re.compile(r"\| *(MISMATCH|CONVERSION)\b")


def attention_of(config: Any) -> str | None:
    """The attention that a model of `config` computes: `sdpa`, `eager`, `flash_attention_2`, …

    `set_attn_implementation` is public and nothing that reads it: until there is (tested with 5.23).
    """
    return getattr(config, "_attn_implementation", None)


def with_attention(config: Any, attention: str) -> Any:
    """A copy of `config` for models of another attention; see `attention_of`."""
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    return config


def is_recurrent(stack: nn.Module) -> bool:
    """Whether a stack carries a state from token to token that no cache can roll back, as Mamba does.

    Until a config says so of every architecture (`layer_types` does of many; tested with 5.23).
    """
    return getattr(stack, "_is_stateful", False)


def hands_on_lengths(stack: nn.Module) -> bool:
    """Whether a stack's attention is told what its forward was told, such as where sequences begin.

    Until there is a public flag (tested with 5.23).
    """
    return getattr(stack, "_supports_attention_backend", False)


def checkpoint_of(module: nn.Module) -> Callable[..., Any] | None:
    """What a block, or an older stack, runs its blocks through when they checkpoint; None if nothing is set.

    `gradient_checkpointing_enable` sets it for all blocks of a model, anew. Nothing public reads it, wraps it
    or puts it back: until blocks have hooks around what is checkpointed (tested with 5.23).
    """
    return getattr(module, "_gradient_checkpointing_func", None)


def set_checkpoint(module: Any, function: Callable[..., Any]) -> None:
    """Let a block, or an older stack, run its blocks through `function`; see `checkpoint_of`."""
    module._gradient_checkpointing_func = function


@contextmanager
def checkpointing_restored(model: nn.Module) -> Iterator[None]:
    """Leave every block to checkpoint as it did before; see `checkpoint_of`.

    Around TRL's generation too, which switches all off, and on again by other rules.
    """
    former = [
        (m, name, getattr(m, name)) for m in model.modules() for name in CHECKPOINTING if hasattr(m, name)
    ]
    try:
        yield
    finally:
        for module, name, value in former:
            setattr(module, name, value)


@contextmanager
def old_names_unheard() -> Iterator[None]:
    """Within it transformers does not warn of its methods' old names.

    TRL 1.16 calls them three times a rollout; one that calls activation_checkpointing_enable ends this.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Inside it one rank may load a model alone, which under ZeRO-3 is otherwise collective.

    What `unset_hf_deepspeed_config` forgets, `set_hf_deepspeed_config` wants as an object that only its owner
    has: until `from_pretrained` can be told to load a model whole (tested with 5.23).
    """
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


@contextmanager
def load_report_kept() -> Iterator[list[str]]:
    """Within it the log lacks the table of weights that did not fit; yields its rows on these, as clauses.

    An error of `from_pretrained` refers to that table, and no `output_loading_info` comes with an error:
    until the error says it itself (tested with 5.23).
    """
    rows: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if is_table := "LOAD REPORT" in text:
            plain = ANSI_STYLE.sub("", text)
            rows.extend(_as_clause(row) for row in plain.splitlines() if NO_FIT.search(row))
        return not is_table

    modeling = logging.getLogger("transformers.modeling_utils")
    level = modeling.level
    modeling.setLevel(logging.WARNING - 1)  # at WARNING it would check more
    modeling.addFilter(keep)
    try:
        yield rows
    finally:
        modeling.removeFilter(keep)
        modeling.setLevel(level)


def _as_clause(row: str) -> str:
    text = " ".join(row.split())
    if sizes := SHAPES.fullmatch(text):
        return "{} has the shape {} in the file and {} in the model".format(*sizes.groups())
    return text
