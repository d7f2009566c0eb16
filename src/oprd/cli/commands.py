"""The `oprd` command. Exit codes: 0; 1 for a failed run; 2 for user errors; 128 + n after signal n."""

import argparse
import io
import json
import logging
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from oprd.cli import key_help
from oprd.cli.arguments import WHOLE, parse_command, recipe_and_flags
from oprd.cli.launch import check_unlaunched, launch
from oprd.foundation.errors import Fault, UserError, is_of_the_disk, refusals_told
from oprd.foundation.foreign.tqdm import open_bars
from oprd.foundation.ranges import EVALUATION_RANGES, check_ranges
from oprd.foundation.ranks import Ranks, leave_ranks
from oprd.foundation.signals import Stopped, leave_at_once, signals_handled

LONGEST_RESPONSE = 16384  # the paper's
PATIENCE_SECONDS = 10


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    for stream in (sys.stdout, sys.stderr):  # a locale without … and ² ends no run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code, with one clear last line where it is not 0."""
    args = argparse.Namespace(command=None)
    try:
        with signals_handled(leave_at_once):
            rest = parse_command(argv, args)
            check_ranges(vars(args), EVALUATION_RANGES)
            _quiet()
            command = _show_keys if vars(args).get("help") else COMMANDS[args.command]
            command(args, rest)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except UserError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt as stop:
        told = stop if isinstance(stop, Stopped) else Stopped(signal.SIGINT)
        if Ranks.launched().is_first:
            print(f"oprd: stopped {told.says or _left(args)}", file=sys.stderr)
        return 128 + told.number
    except Exception as error:
        _close_bars()
        says_all = isinstance(error, Fault | BrokenPipeError) or is_of_the_disk(error)
        if not says_all and getattr(error, "filename", None) is None:
            traceback.print_exc()
        print(f"oprd: the run failed: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _left(args: argparse.Namespace) -> str:
    """What a command that was stopped outside a run leaves behind, and what the same command does next."""
    if args.command == "eval":
        from oprd.evaluation.evaluate import num_kept

        return f"with {num_kept(args.output)} problems done: the same command goes on from there"
    if args.command == "demo":
        return "between two runs: the same command keeps those that are finished"
    unwritten = "the bridge was complete" if args.command == "bridge" else "anything was written"
    return f"before {unwritten}: the same command starts over"


def _demo(args: argparse.Namespace, _: list[str]) -> None:
    from oprd.cli.demo import print_summary, run_demo

    default = Path("runs/demo" if args.pair == "same" else f"runs/demo-{args.pair}")
    output = args.output or default
    summary = run_demo(output, args.steps, args.problems, args.samples, args.seed, args.pair)
    print_summary(summary, output)


def _train(args: argparse.Namespace, rest: list[str]) -> None:
    from oprd.preflight.dry_run import try_longest
    from oprd.training.train import parse_training_recipe, train

    if args.accelerate_config is not None:
        check_unlaunched()
        _read_recipe(args, rest, parse_training_recipe)  # whose mistakes one process tells
        recipe, flags = recipe_and_flags(args, rest)
        launch(args.accelerate_config, args.num_processes, [*([str(recipe)] if recipe else []), *flags])
    run, config = _read_recipe(args, rest, parse_training_recipe)
    if args.num_processes is not None:
        raise UserError("--num_processes goes with --accelerate_config: name one, or use accelerate launch")
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

    if dist.is_initialized() and not config.use_vllm:  # vLLM takes its groups down itself
        leave_ranks()


def _doctor(args: argparse.Namespace, rest: list[str]) -> None:
    from oprd.preflight.doctor import examine, show_finding, show_memory
    from oprd.preflight.planning.machine import parse_size
    from oprd.training.train import parse_training_recipe

    run, config = _read_recipe(args, rest, parse_training_recipe)
    gpu_bytes = None if args.gpu is None else parse_size(args.gpu)
    with refusals_told():
        tell = {} if args.json else {"tell": show_finding}
        diagnosis = examine(run, config, args.ranks, gpu_bytes, **tell)
    if args.json:
        print(json.dumps(diagnosis.as_json(), indent=2))
    else:
        show_memory(diagnosis)
    for finding in diagnosis.findings:
        if not finding.is_well:
            recipe, _ = recipe_and_flags(args, rest)
            raise UserError(f"{f'{recipe}: ' if recipe else ''}{finding.about}: {finding.says}")


def _bridge(args: argparse.Namespace, rest: list[str]) -> None:
    from oprd.bridge import Bridge
    from oprd.bridge.from_rollouts import fit_bridge
    from oprd.bridge.plots import print_bridge
    from oprd.bridge.recipe import parse_bridge_recipe

    folder = fit_bridge(_read_recipe(args, rest, parse_bridge_recipe))
    if Ranks.launched().is_first:
        print_bridge(Bridge.load(folder).metadata)
        print(f"bridge and report: {folder}")


def _eval_alone(args: argparse.Namespace, rest: list[str]) -> None:
    from oprd.evaluation.evaluate import evaluation_folder

    with evaluation_folder(args.output):
        _eval(args, rest)


def _eval(args: argparse.Namespace, _: list[str]) -> None:
    import torch

    from oprd.evaluation.evaluate import evaluate
    from oprd.evaluation.problems import EvalSettings, response_room
    from oprd.evaluation.table import print_summary
    from oprd.models.finite import check_loaded
    from oprd.models.loading import load_with_tokenizer, resolve_model
    from oprd.rollouts.engines.choose import choose_engine
    from oprd.rollouts.generation import Sampling
    from oprd.rollouts.prompts import load_prompts

    rows = load_prompts(args.data, args.split)
    rows = rows if args.limit is None else rows.select(range(min(args.limit, len(rows))))
    source: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    source |= {} if args.revision is None else {"revision": args.revision}
    located = resolve_model(args.model, **source)
    model, tokenizer = load_with_tokenizer(located, dtype=args.dtype, **source)
    check_loaded(model, args.model)
    engine = choose_engine(
        args.engine, args.vllm_server_base_url, model, tokenizer, located, hub_kwargs=source
    )
    if engine.name == "hf" and torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]  # transformers' type of `to` lacks its `self`
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
    print_summary(summary, args.output)


def _tiny(args: argparse.Namespace, _: list[str]) -> None:
    from oprd.models.tiny.build import RUNS, build

    for settings in RUNS:
        for name, share in build(args.output, replace(settings, seed=settings.seed + args.seed)).items():
            print(f"{name}: {share:.1%} greedy, in {args.output / name}")


COMMANDS = {
    "demo": _demo,
    "train": _train,
    "doctor": _doctor,
    "bridge": _bridge,
    "eval": _eval_alone,
    "tiny": _tiny,
}


def _read_recipe(args: argparse.Namespace, rest: list[str], parse: Callable[..., Any]) -> Any:
    """What `parse` makes of the recipe and flags; a key of another command's recipe is named as such."""
    from oprd.foundation.recipe import UnknownKey

    recipe, flags = recipe_and_flags(args, rest)
    try:
        return parse(recipe, flags)
    except UnknownKey as error:
        other = "train" if args.command == "bridge" else "bridge"
        if error.key not in {field.name for kind in _recipe_kinds(other) for field in fields(kind)}:
            raise
        raise UserError(
            f"{error.where}{error.key} is a key of oprd {other}, not of oprd {args.command}"
        ) from error


def _recipe_kinds(command: str) -> tuple[type, ...]:
    """The dataclasses that hold the keys of a command's recipe."""
    if command == "bridge":
        from oprd.bridge.recipe import BridgeArguments

        return (BridgeArguments,)
    from oprd.training.config import OPRDConfig
    from oprd.training.run_arguments import RunArguments

    return RunArguments, OPRDConfig


def _show_keys(args: argparse.Namespace, _: list[str]) -> None:
    """The command's help, with the keys of its recipe."""
    is_bridge, kinds = args.command == "bridge", _recipe_kinds(args.command)
    groups = key_help.BRIDGE_GROUPS if is_bridge else key_help.TRAINING_GROUPS
    key_help.add_key_help(args.parser, kinds, groups, everything=args.help == WHOLE)
    args.parser.print_help()


def _complain(error: UserError) -> None:
    """Print a mistake as one line; one rank prints it, whichever rank made it."""
    ranks = Ranks.launched()
    if ranks.local > 0:
        time.sleep(PATIENCE_SECONDS)  # if the first one makes the same mistake, the launcher ends this one
    where = "" if ranks.is_first else f"[rank {ranks.index}] "
    _close_bars()
    print(f"{where}oprd: {' '.join(str(error).split())}", file=sys.stderr)


def _close_bars() -> None:
    """Close the progress bars that an error left open, so that none is drawn below its message."""
    for bar in open_bars():
        bar.close()


def _quiet() -> None:
    """Show progress bars and warnings alone: other libraries' messages are off."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[_AboveBars()])
    logging.getLogger("oprd").setLevel(logging.INFO if Ranks.launched().is_first else logging.ERROR)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")


class _AboveBars(logging.Handler):
    """Prints a line above the progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


if __name__ == "__main__":
    main()
