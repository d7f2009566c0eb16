"""What can be turned so that a run takes less memory, and what that saves."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from oprd.foundation.meters import MB
from oprd.preflight.longest import Longest
from oprd.preflight.planning.machine import Machine
from oprd.preflight.planning.memory_plan import MemoryPlan, plan_memory

WORTHWHILE = 0.05  # of the peak: a knob that saves less is not worth naming


@dataclass(frozen=True)
class Knob:
    """Keys to change, as they are written in a recipe, and the peak with them."""

    keys: str
    peak_mb: float


def first_knob(
    student: str, config: Any, longest: Longest, machine: Machine, plan: MemoryPlan, peft_config: Any = None
) -> Knob | None:
    """The first knob of an `OPRDConfig` that makes a run fit, or that saves something worth it if it fits.

    The cheapest come first; each is planned. Where none is enough by itself, the one that saves most.
    """
    worthwhile = []
    for keys, other, where in _turns(config, longest, machine):
        then = replace(longest, response_ids=longest.response_ids[: other.max_completion_length])
        knob = Knob(keys, plan_memory(student, other, then, where, peft_config).peak_mb)
        if knob.peak_mb <= (1 - WORTHWHILE) * plan.peak_mb:
            worthwhile.append(knob)
            if knob.peak_mb * MB <= machine.free_bytes:
                return knob
    return min(worthwhile, key=lambda knob: knob.peak_mb, default=None)


def _turns(config: Any, longest: Longest, machine: Machine) -> Iterator[tuple[str, Any, Machine]]:
    """What may be turned, what costs least first: the keys, and the run with them."""

    def turn(**changes: Any) -> tuple[str, Any, Machine]:
        other = copy.copy(config)
        vars(other).update(changes)
        line = yaml.safe_dump(changes, default_flow_style=True, sort_keys=False, width=1000)
        return line.strip()[1:-1], other, machine

    micro_batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    budget = config.max_tokens_per_micro_batch
    if not config.gradient_checkpointing:
        yield turn(gradient_checkpointing=True)
    if config.keep_attention:
        yield turn(keep_attention=False)
    if budget is not None and budget >= 2 * longest.num_tokens:
        yield turn(max_tokens_per_micro_batch=budget // 2)
    elif budget is None and micro_batch % 2 == 0:
        yield turn(per_device_train_batch_size=micro_batch // 2, gradient_accumulation_steps=accumulation * 2)
    if config.output_schedule.ever_active and config.output_chunk_size > 1:
        yield turn(output_chunk_size=-(-config.output_chunk_size // 4))
    if machine.ranks > 1 and not machine.sharded:
        yield "FSDP, which shards both models", config, replace(machine, sharded=True)
    teacher = dict(config.teacher_model_init_kwargs or {})
    if machine.is_gpu and "device_map" not in teacher and not config.teacher_offload:
        yield turn(teacher_offload=True)
    if teacher.get("dtype", "float32") == "float32":
        yield turn(teacher_model_init_kwargs=teacher | {"dtype": "bfloat16"})
    if len(longest.response_ids) > 1:
        yield turn(max_completion_length=len(longest.response_ids) // 2)


def advice(plan: MemoryPlan, knob: Knob | None) -> str:
    """What to turn first, in words."""
    if knob is None:
        return "shorter rollouts, a smaller model or more ranks are left"
    return f"first turn {knob.keys} (saves {plan.peak_mb - knob.peak_mb:,.0f} MB)"
