"""What `--help` says of a command's recipe keys: generated from the dataclasses that hold them."""

import argparse
import inspect
import re
import shutil
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from fnmatch import fnmatch
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

COLUMN = 32  # where the sentences begin
WORDS = {bool: "BOOL", int: "N", float: "X", str: "TEXT", dict: "{…}", list: "A B …"}
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<=\.)\s+(?=[A-Z`'\"(])")


@dataclass(frozen=True)
class Group:
    """Keys under a heading: those that are always shown, and patterns of those that `--help all` adds."""

    title: str
    keys: tuple[str, ...]
    more: tuple[str, ...] = ()


TRAINING_GROUPS = (
    Group(
        "models",
        (
            *("model_name_or_path", "teacher_model_name_or_path", "model_init_kwargs"),
            *("teacher_model_init_kwargs", "teacher_model_revision", "trust_remote_code"),
            *("teacher_offload", "teacher_quantization", "reference_model_name_or_path"),
        ),
    ),
    Group(
        "data",
        (
            *("dataset_name", "dataset_config", "dataset_train_split", "max_prompt_length"),
            "drop_unrenderable_prompts",
            *("chat_template_kwargs", "teacher_chat_template", "teacher_tokenization"),
            "teacher_chat_template_kwargs",
        ),
        ("shuffle_dataset", "pad_to_multiple_of", "remove_unused_columns", "dataloader_*", "label*"),
    ),
    Group(
        "objective",
        (
            *("layers", "positions", "bridge", "bridge_rank", "final_norm", "representation_loss"),
            *("representation_weight", "teacher_extrapolation", "row_weights", "anchor_weight"),
            *("output_loss", "output_weight", "output_positions"),
            *("output_baseline", "output_top_k", "output_support", "renormalize", "divergence"),
            "student_temperature",
            *("teacher_temperature", "reduction", "mask_truncated_completions"),
        ),
    ),
    Group(
        "rollouts",
        (
            *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p"),
            *("use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_server_base_url"),
            *("vllm_importance_sampling_correction", "vllm_importance_sampling_clip_max"),
        ),
        ("vllm_*", "generation_*", "repetition_penalty", "cache_implementation", "max_tool_*"),
    ),
    Group(
        "steps and optimiser",
        (
            *("max_steps", "num_train_epochs", "per_device_train_batch_size"),
            *("gradient_accumulation_steps", "max_tokens_per_micro_batch", "learning_rate"),
            *("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "seed"),
        ),
        ("optim*", "adam_*", "lr_*", "*_seed", "disable_dropout", "full_determinism"),
    ),
    Group("LoRA", ("use_peft", "lora_*", "use_rslora", "use_dora")),
    Group(
        "precision, memory, processes",
        (
            *("bf16", "fp16", "gradient_checkpointing", "padding_free", "keep_attention"),
            *("output_chunk_size", "fsdp", "deepspeed", "dry_run"),
        ),
        (
            *("fsdp_*", "ddp_*", "tf32", "*_full_eval", "gradient_checkpointing_*", "torch_*", "use_*"),
            *("activation_*", "parallelism_*", "accelerator_*", "ds3_*", "auto_find_*", "neftune*"),
        ),
    ),
    Group(
        "run folder, logging, accuracy",
        (
            *("output_dir", "save_steps", "save_total_limit", "logging_steps", "report_to", "run_name"),
            *("accuracy_*", "load_best", "stop_on_collapse", "diagnostics_steps", "disable_tqdm"),
        ),
        ("save_*", "logging_*", "log_*", "*hub*", "resume_*", "num_completions_*", "project", "trackio*"),
    ),
    Group("evaluation by TRL", (), ("eval_*", "*_eval_*", "prediction_*", "*best_model*", "batch_eval*")),
)
BRIDGE_GROUPS = (
    Group(
        "models",
        ("model_name_or_path", "teacher_model_name_or_path", "dtype", "trust_remote_code", "output_dir"),
    ),
    Group("data", ("dataset_*", "*prompt*", "*chat_template*", "teacher_tokenization")),
    Group(
        "rollouts",
        (
            *("num_generations", "max_completion_length", "temperature", "top_p", "top_k"),
            *("batch_size", "engine", "vllm_*", "seed"),
        ),
    ),
    Group("fit", ("*",)),
)


def add_key_help(
    parser: argparse.ArgumentParser,
    kinds: Sequence[type],
    groups: Iterable[Group],
    everything: bool,
) -> None:
    """Add the keys of `kinds` to the help of `parser`; those of libraries that no group shows, if asked."""
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    left = {field.name: field for kind in kinds for field in fields(kind) if field.init}
    left = {name: field for name, field in left.items() if field.metadata.get("help")}
    bases = {base for kind in kinds for base in kind.__mro__}
    ours, theirs = (
        {name for base in bases if _is_ours(base) == ask for name in inspect.get_annotations(base)}
        for ask in (True, False)
    )
    rows: list[tuple[str, list[Field]]] = []
    for group in groups:
        shown = list(_taken(left, group.keys))
        rest = list(_taken(left, group.more)) if everything else []
        rows.append((group.title, shown + rest))
    rows.append(("other keys", list(_taken(left, ["*"] if everything else sorted(ours - theirs)))))
    for title, members in rows:
        section = parser.add_argument_group(title)
        for field in members:
            text = _sentence(field, is_ours=field.name in ours)
            section.add_argument(f"--{field.name}", metavar=_word(hints[field.name]), help=text)
    if left:
        parser.epilog = (
            f"{parser.prog} --help all shows {len(left)} more keys, of TRL and transformers. docs/recipes.md "
            "explains ours."
        )


def formatter(prog: str) -> argparse.HelpFormatter:
    """argparse's layout with room for the names of keys."""
    return argparse.HelpFormatter(prog, max_help_position=COLUMN, width=shutil.get_terminal_size().columns)


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("oprd.")


def _taken(left: dict[str, Field], patterns: Iterable[str]) -> Iterator[Field]:
    """The keys that match, in the order of the patterns; removed, so that no other group shows them."""
    for pattern in patterns:
        for name in [name for name in left if fnmatch(name, pattern)]:
            yield left.pop(name)


def _sentence(field: Field, is_ours: bool) -> str:
    """A key's help (of a library's key the first sentence) and its default; our empty ones are required."""
    text = " ".join(str(field.metadata["help"]).replace("%%", "%").split())
    if not is_ours:
        text = SENTENCE_END.split(text)[0]
    default = field.default if field.default is not MISSING else None
    value = default.value if isinstance(default, Enum) else default
    value = str(value).lower() if isinstance(value, bool) else value
    told = "" if value is None else " (required)" if value == "" and is_ours else f" (default: {value})"
    return (text + told).replace("%", "%%")


def _word(hint: Any) -> str:
    """What stands for a value: by its type, without the None that means "not set"."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = [get_origin(option) or option for option in options if option is not type(None)]
    if Literal in plain or any(isinstance(option, type) and issubclass(option, Enum) for option in plain):
        return "NAME"
    return next((word for kind, word in WORDS.items() if kind in plain and kind is not str), WORDS[str])
