"""The `oprd` command: thin fronts of the library. Exit codes: 0; 2 for the user's mistakes; 1 for faults."""

import argparse
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from oprd.errors import UserError, refusals_told
from oprd.ranges import EVALUATION_RANGES, check_ranges
from oprd.signals import Stopped, leave_at_once, signals_handled

LONGEST_RESPONSE = 16384  # the paper's
PATIENCE_SECONDS = 10


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code, with one clear last line where it is not 0."""
    args = argparse.Namespace(command=None)
    try:
        with signals_handled(leave_at_once):
            _, rest = _parser().parse_known_args(argv, args)
            if rest and args.command not in ("train", "bridge", "doctor"):
                raise UserError(f"unknown argument {rest[0]!r}; see oprd {args.command} --help")
            check_ranges(vars(args), EVALUATION_RANGES)
            _quiet()
            args.function(args, rest)
    except UserError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt as stop:
        told = stop if isinstance(stop, Stopped) else Stopped(signal.SIGINT)
        if _is_first():
            print(f"oprd: stopped {told.says or _left(args)}", file=sys.stderr)
        return 128 + told.number
    except Exception as error:
        traceback.print_exc()
        print(f"oprd: the run failed: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="oprd", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="distil the bundled student, with both baselines, in minutes")
    demo.add_argument(
        "--pair",
        choices=["same", "bridge", "tokenizer"],
        default="same",
        help="teacher: of the student's architecture, deeper and wider, or of another tokenizer too",
    )
    demo.add_argument("--output", type=Path, help="default: runs/demo, runs/demo-bridge, …")
    demo.add_argument("--steps", type=_positive, default=220, help="optimiser steps per arm")
    demo.add_argument(
        "--problems", type=_positive, default=128, help="held-out problems for the final evaluation"
    )
    demo.add_argument("--samples", type=_positive, default=16, help="samples per problem")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(function=_demo)

    train = commands.add_parser("train", help="run or resume a recipe; --key value overrides its keys")
    train.add_argument("recipe", type=Path)
    train.set_defaults(function=_train)

    doctor = commands.add_parser("doctor", help="will this recipe run here? --key value overrides its keys")
    doctor.add_argument("recipe", type=Path)
    doctor.add_argument(
        "--ranks", type=_positive, help="plan for so many processes; default: WORLD_SIZE, or 1"
    )
    doctor.add_argument("--json", action="store_true", help="for scripts")
    doctor.set_defaults(function=_doctor)

    bridge = commands.add_parser("bridge", help="fit a bridge between two models; --key value overrides")
    bridge.add_argument("recipe", type=Path)
    bridge.set_defaults(function=_bridge)

    evaluation = commands.add_parser("eval", help="Avg@k and friends of a model on a set of problems")
    evaluation.add_argument("--model", required=True, help="a Hub name, a folder, or tiny:student")
    evaluation.add_argument("--revision", help="branch, tag or commit of a Hub model")
    evaluation.add_argument("--trust_remote_code", action="store_true", help="run code that comes with it")
    evaluation.add_argument("--data", required=True, help="tiny, a parquet/jsonl/json file, or a Hub name")
    evaluation.add_argument("--output", type=Path, required=True)
    evaluation.add_argument("--split", default="test")
    evaluation.add_argument("--limit", type=_positive, help="evaluate the first so many problems only")
    evaluation.add_argument("--samples", type=int, default=16)
    evaluation.add_argument("--temperature", type=float, default=0.7)
    evaluation.add_argument("--top_p", type=float, default=0.95)
    evaluation.add_argument("--top_k", type=int, default=0)
    evaluation.add_argument("--max_new_tokens", type=int, help="default: 16384, or what the context leaves")
    evaluation.add_argument("--batch_size", type=int, default=64, help="responses generated at a time")
    evaluation.add_argument("--seed", type=int, default=0)
    evaluation.add_argument("--prompt_suffix", default="")
    evaluation.add_argument("--chat_template_kwargs", type=_json_object, help="a JSON object")
    evaluation.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    evaluation.add_argument(
        "--engine", default="auto", choices=["auto", "hf", "vllm"], help="auto: vLLM if there"
    )
    evaluation.add_argument(
        "--vllm_server_base_url", help="ask a server of vllm serve, e.g. http://localhost:8000"
    )
    evaluation.set_defaults(function=_eval_alone)

    tiny = commands.add_parser("tiny", help="rebuild the bundled models")
    tiny.add_argument("action", choices=["build"])
    tiny.add_argument("--output", type=Path, default=Path("runs/tiny"))
    tiny.add_argument("--seed", type=int, default=0)
    tiny.set_defaults(function=_tiny)
    return parser


def _left(args: argparse.Namespace) -> str:
    """What a stopped command leaves where no run was under way, and what the same command does."""
    if args.command == "eval":
        from oprd.evaluation.run import num_kept

        return f"with {num_kept(args.output)} problems done: the same command goes on from there"
    if args.command == "demo":
        return "between two runs: the same command keeps those that are finished"
    unwritten = "the bridge was whole" if args.command == "bridge" else "anything was written"
    return f"before {unwritten}: the same command starts over"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


def _demo(args: argparse.Namespace, _: list[str]) -> None:
    from oprd.demo import print_summary, run_demo

    default = Path("runs/demo" if args.pair == "same" else f"runs/demo-{args.pair}")
    output = args.output or default
    summary = run_demo(output, args.steps, args.problems, args.samples, args.seed, args.pair)
    print_summary(summary, output)


def _train(args: argparse.Namespace, flags: list[str]) -> None:
    from oprd.dry_run import try_longest
    from oprd.train import parse_training_recipe, train

    run, config = parse_training_recipe(args.recipe, flags)
    try:
        report = try_longest(run, config) if run.dry_run else f"the run is in {train(run, config)}"
    except Stopped as stop:
        if stop.by_all:
            _leave_ranks(config)
        raise
    if config.process_index == 0:
        print(report)
    _leave_ranks(config)


def _leave_ranks(config: Any) -> None:
    import torch.distributed as dist

    from oprd.ranks import leave_ranks

    if dist.is_initialized() and not config.use_vllm:  # vLLM takes its groups down itself
        leave_ranks()


def _doctor(args: argparse.Namespace, flags: list[str]) -> None:
    from oprd.doctor import examine, show_finding, show_memory
    from oprd.train import parse_training_recipe

    run, config = parse_training_recipe(args.recipe, flags)
    with refusals_told():
        tell = {} if args.json else {"tell": show_finding}
        diagnosis = examine(run, config, args.ranks, **tell)
    if args.json:
        print(json.dumps(diagnosis.as_json(), indent=2))
    else:
        show_memory(diagnosis)
    for finding in diagnosis.findings:
        if not finding.is_well:
            raise UserError(f"{args.recipe}: {finding.about}: {finding.says}")


def _bridge(args: argparse.Namespace, flags: list[str]) -> None:
    from oprd.bridge import Bridge
    from oprd.bridge.report import print_bridge
    from oprd.bridge_recipe import parse_bridge_recipe
    from oprd.bridge_run import fit_bridge

    folder = fit_bridge(parse_bridge_recipe(args.recipe, flags))
    if _is_first():
        print_bridge(Bridge.load(folder).metadata)
        print(f"bridge and report: {folder}")


def _eval_alone(args: argparse.Namespace, rest: list[str]) -> None:
    from oprd.evaluation.run import evaluation_folder

    with evaluation_folder(args.output):
        _eval(args, rest)


def _eval(args: argparse.Namespace, _: list[str]) -> None:
    import torch

    from oprd.engines.choose import choose_engine
    from oprd.evaluation.problems import EvalSettings, response_room
    from oprd.evaluation.run import evaluate
    from oprd.models import load_model, load_tokenizer, resolve_model
    from oprd.prompts import load_prompts
    from oprd.rollouts import Sampling

    rows = load_prompts(args.data, args.split)
    rows = rows if args.limit is None else rows.select(range(min(args.limit, len(rows))))
    source: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    source |= {} if args.revision is None else {"revision": args.revision}
    located = resolve_model(args.model, **source)
    tokenizer = load_tokenizer(located, **source)
    model = load_model(located, dtype=args.dtype, **source)
    engine = choose_engine(
        args.engine, args.vllm_server_base_url, model, tokenizer, located, hub_kwargs=source
    )
    if engine.name == "hf" and torch.cuda.is_available():
        model = model.to("cuda")
    settings = EvalSettings(
        samples=args.samples,
        batch_size=args.batch_size,
        prompt_suffix=args.prompt_suffix,
        chat_template_kwargs=args.chat_template_kwargs,
        seed=args.seed,
    )
    limit = args.max_new_tokens
    if limit is None:
        room = response_room(model, tokenizer, rows, settings)
        limit = LONGEST_RESPONSE if room is None else max(1, min(LONGEST_RESPONSE, room))
    sampling = Sampling(limit, args.temperature, args.top_p, args.top_k)
    settings = replace(settings, sampling=sampling)
    summary = evaluate(model, tokenizer, rows, settings, args.output, args.model, engine=engine)
    print(json.dumps({key: value for key, value in summary.items() if key != "settings"}, indent=2))


def _tiny(args: argparse.Namespace, _: list[str]) -> None:
    from oprd.tiny.build import RUNS, build

    for settings in RUNS:
        for name, share in build(args.output, replace(settings, seed=settings.seed + args.seed)).items():
            print(f"{name}: {share:.1%} greedy, in {args.output / name}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _is_first() -> bool:
    """Whether this is the first of the processes that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _complain(error: UserError) -> None:
    """Print a mistake as one line; one rank of several tells it, whichever made it."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE_SECONDS)  # if the first one makes the same mistake, the launcher ends this one
    where = "" if _is_first() else f"[rank {os.environ['RANK']}] "
    print(f"{where}oprd: {' '.join(str(error).split())}", file=sys.stderr)


def _quiet() -> None:
    """Leave the screen to progress bars and to what the user has to know."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("oprd").setLevel(logging.INFO if _is_first() else logging.ERROR)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")


if __name__ == "__main__":
    main()
