"""The line before the first rollout: how many steps and rollouts, the objective, and where the run writes."""

from typing import Any

from oprd.objective.selection import LayerMap
from oprd.objective.settings import Schedule
from oprd.objective.terms import ANCHOR, OUTPUT, REPRESENTATION


def start_line(args: Any, layer_map: LayerMap, num_processes: int, first_step: int, last_step: int) -> str:
    """A run with the keys of `args`, an `OPRDConfig`, from step `first_step`, counted from 1, on."""
    rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
    prompts, each = rollouts // args.num_generations, args.num_generations
    steps = f"{last_step:,} step{'s' * (last_step > 1)}"
    if first_step > 1:
        steps = f"steps {first_step:,} to {last_step:,}"
    longest = args.max_completion_length
    length = f"up to {longest:,} tokens" if longest else "any length"
    engine = f"vLLM, {args.vllm_mode}" if args.use_vllm else "Hugging Face's generate"
    ranks = f"{num_processes} × {args.device.type}" if num_processes > 1 else args.device.type
    return (
        f"{steps} of {rollouts} rollouts ({prompts} prompts × {each}) of {length}, by {engine}; "
        f"{_objective(args, layer_map)}; {_precision(args)} on {ranks}; writes to {args.output_dir}"
    )


def _objective(args: Any, layer_map: LayerMap) -> str:
    """The terms that are ever on, with their weights."""
    layers = len(layer_map.pairs)
    how = " through a bridge" if args.bridge else ""
    if args.teacher_extrapolation != 1:
        how = f", λ = {args.teacher_extrapolation:g}"
    where = f"{layers} layer{'s' * (layers > 1)}, rows {args.positions}{how}"
    words = {
        REPRESENTATION: f"{args.representation_loss.partition('#')[0]} ({where})",
        OUTPUT: f"{args.output_loss} (rows {args.output_positions})",
        ANCHOR: "anchor",
    }
    active = {term: schedule for term, schedule in args.schedules.items() if schedule.ever_active}
    return " + ".join(
        _weighted(getattr(args, f"{term}_weight"), words[term], active[term]) for term in active
    )


def _weighted(weight: str, words: str, schedule: Schedule) -> str:
    is_one = schedule.knots == ((0, 1.0),)
    return words if is_one else f"[{weight}] × {words}" if "=" in weight else f"{weight} × {words}"


def _precision(args: Any) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
