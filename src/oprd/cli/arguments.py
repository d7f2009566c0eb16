"""Parses the `oprd` command line: commands, their flags, and the recipe."""

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oprd.cli.key_help import formatter
from oprd.foundation.errors import UserError

RECIPES = (".yaml", ".yml")
WHOLE = "all"  # of --help: every key


def parse_command(argv: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Put a command and its flags into `args`; returns what is left: a recipe and its keys.

    Raises `UserError`.
    """
    if argv and argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    if argv and Path(argv[0]).suffix in RECIPES:
        raise UserError(f"{argv[0]} is a recipe: oprd train {argv[0]}, or bridge or doctor in place of train")
    _, rest = _parser().parse_known_args(argv, args)
    if rest and "config" not in args:
        raise UserError(f"unknown argument {rest[0]!r}; see oprd {args.command} --help")
    return rest


def recipe_and_flags(args: argparse.Namespace, rest: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The recipe, None where all its keys are flags, and the flags; raises `UserError`."""
    words = list(rest)
    named = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    if named and args.config:
        raise UserError(f"there are two recipes, {named} and {args.config}: name one")
    recipe = args.config or named
    if recipe is None and not words:
        raise UserError(
            f"oprd {args.command} needs a recipe, a YAML file, or its keys as flags "
            f"(--model_name_or_path …); see oprd {args.command} --help"
        )
    return recipe, words


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="oprd",
        description="On-policy representation distillation of language models (arXiv 2606.06021).",
        epilog="oprd COMMAND --help shows a command's flags and the keys of its recipe.",
    )
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="distil bundled models by several methods, in minutes")
    demo.add_argument(
        "--pair",
        choices=["same", "bridge", "tokenizer"],
        default="same",
        help="teacher: same architecture, deeper and wider, or with another tokenizer as well",
    )
    demo.add_argument("--output", type=_folder, help="default: runs/demo, runs/demo-bridge, …")
    demo.add_argument("--steps", type=_positive, default=220, help="optimiser steps per arm")
    demo.add_argument(
        "--problems", type=_positive, default=128, help="held-out problems for the final evaluation"
    )
    demo.add_argument("--samples", type=_positive, default=16, help="samples per problem")
    demo.add_argument("--seed", type=int, default=0, help="random seed of prompts and sampling")

    train = _add_recipe_command(commands, "train", "run or resume a recipe")
    train.add_argument(
        "--accelerate_config",
        metavar="NAME|FILE",
        help="start accelerate's launcher: fsdp2, zero2, multi_gpu, … as TRL names them, or a file",
    )
    train.add_argument(
        "--num_processes", type=_positive, metavar="N", help="for --accelerate_config; default: one per GPU"
    )
    doctor = _add_recipe_command(commands, "doctor", "check a recipe and plan its memory, without a run")
    doctor.add_argument(
        "--ranks", type=_positive, metavar="N", help="plan for N processes; default: WORLD_SIZE, or 1"
    )
    doctor.add_argument(
        "--gpu", metavar="SIZE", help="plan for GPUs with this much memory, such as 80GB, on any machine"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON, for scripts")
    _add_recipe_command(commands, "bridge", "fit a bridge between models that differ in depth or width")
    _add_evaluation(commands)

    tiny = commands.add_parser("tiny", help="rebuild the bundled models")
    tiny.add_argument("action", choices=["build"], help="retrain them")
    tiny.add_argument("--output", type=_folder, default=Path("runs/tiny"), help="their folder")
    tiny.add_argument("--seed", type=int, default=0, help="added to the seeds of the bundled ones")
    return parser


def _add_recipe_command(commands: Any, name: str, does: str) -> argparse.ArgumentParser:
    """A command whose recipe and keys are left to the recipe's own parser."""
    parser = commands.add_parser(
        name,
        help=does,
        usage=f"oprd {name} RECIPE.yaml [--key value …]",
        description=f"{does[0].upper()}{does[1:]}. Set keys in the YAML file, as key: value, or as flags, "
        "which override the file. The file can be left out if the flags set all required keys.",
        add_help=False,
        formatter_class=formatter,
    )
    parser.add_argument(
        *("-h", "--help"), nargs="?", const=True, choices=[WHOLE], metavar=WHOLE, help="show the keys"
    )
    parser.add_argument(
        "--config", type=Path, metavar="RECIPE.yaml", help="the recipe, as for TRL's commands"
    )
    parser.set_defaults(parser=parser)
    return parser


def _add_evaluation(commands: Any) -> None:
    evaluation = commands.add_parser("eval", help="sample and grade answers: Avg@k, Best@k and more")
    flag = evaluation.add_argument
    flag("--model", required=True, help="a Hub name, a folder, or tiny:student")
    flag("--revision", help="branch, tag or commit of a Hub model")
    flag("--trust_remote_code", action="store_true", help="run code that comes with it")
    flag("--data", required=True, help="tiny, word-problems, a parquet/jsonl/json file, or a Hub name")
    flag("--output", type=_folder, required=True, help="the folder of answers and summary")
    flag("--split", default="test", help="split of the dataset")
    flag("--limit", type=_positive, help="evaluate the first n problems only")
    flag("--samples", type=int, default=16, help="responses per problem: the k of Avg@k")
    flag("--temperature", type=float, default=0.7, help="of sampling; 0 is greedy")
    flag("--top_p", type=float, default=0.95, help="top-p (nucleus) sampling")
    flag("--top_k", type=int, default=0, help="most likely tokens to sample from; 0: all")
    flag("--max_new_tokens", type=int, help="default: 16384, or what the context leaves")
    flag("--batch_size", type=int, default=64, help="responses generated at a time")
    flag("--seed", type=int, default=0, help="of sampling")
    flag("--prompt_suffix", default="", help="appended to every problem, as an instruction to box the answer")
    flag("--chat_template_kwargs", type=_json_object, help="a JSON object")
    flag("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the model")
    flag("--engine", default="auto", choices=["auto", "hf", "vllm"], help="auto: vLLM if installed")
    flag("--vllm_server_base_url", help="use a vllm serve server, e.g. http://localhost:8000")


class _Formatter(argparse.HelpFormatter):
    """argparse's layout, with the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_told = action.default not in (None, "", False, argparse.SUPPRESS)
        return f"{action.help or ''}{f' (default: {action.default})' if is_told else ''}"


class _Parser(argparse.ArgumentParser):
    """Takes whole names of flags only; a mistake is a `UserError`."""

    def __init__(self, formatter_class: Any = _Formatter, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=formatter_class, **kwargs)

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


def _versions() -> str:
    ours, *others = (f"{name} {importlib.metadata.version(name)}" for name in ("oprd", "torch", "trl"))
    return f"{ours} ({', '.join(others)}, transformers {importlib.metadata.version('transformers')})"


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a folder")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # of a number of 5,000 digits too
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
