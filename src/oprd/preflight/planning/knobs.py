"""What can be turned so that a run takes less memory, and what that saves."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from oprd.foundation.meters import MB
from oprd.preflight.planning.longest import Longest
from oprd.preflight.planning.machine import Machine
from oprd.preflight.planning.memory_plan import MemoryPlan, plan_memory
from oprd.preflight.planning.parts import ENGINE, OPTIMISER, PROCESS, REFERENCE, STUDENT, TEACHER

WORTHWHILE = 0.05  # of the peak: a knob that saves less is not worth naming
MODELS = frozenset({STUDENT, TEACHER, REFERENCE, OPTIMISER})


@dataclass(frozen=True)
class Knob:
    """Keys to change, as they are written in a recipe or on the command line, and the peak with them."""

    keys: str
    peak_mb: float


@dataclass(frozen=True)
class _Turn:
    """A run with a knob turned; of what stays in memory throughout it makes `shrinks` smaller."""

    keys: str
    config: Any
    machine: Machine
    shrinks: frozenset[str] = frozenset()

    def best_mb(self, plan: MemoryPlan) -> float:
        """The least that could be left of the peak: what stays throughout."""
        fullest = max(plan.rollout, plan.update, key=lambda parts: sum(parts.values()))
        stays = (MODELS | {PROCESS, ENGINE}) - self.shrinks
        return sum(size for part, size in fullest.items() if part in stays) / MB


def first_knob(
    student: str,
    config: Any,
    longest: Longest,
    machine: Machine,
    plan: MemoryPlan,
    peft_config: Any = None,
) -> Knob | None:
    """The first knob of an `OPRDConfig` that makes a run fit, or that saves something worth it if it fits.

    The cheapest come first. Where none is enough by itself, the one that saves most. What it saves is what a
    plan with it says.
    """
    best: Knob | None = None
    enough = (1 - WORTHWHILE) * plan.peak_mb
    for turn in _turns(config, longest, machine):
        if turn.best_mb(plan) > enough:  # known without another plan
            continue
        other = turn.config
        longest_then = replace(longest, response_ids=longest.response_ids[: other.max_completion_length])
        turned = plan_memory(student, other, longest_then, turn.machine, peft_config)
        knob = Knob(turn.keys, turned.peak_mb)
        if knob.peak_mb > enough:
            continue
        if knob.peak_mb * MB <= machine.free_bytes:
            return knob
        if best is None or knob.peak_mb < best.peak_mb:
            best = knob
    return best


def _turns(config: Any, longest: Longest, machine: Machine) -> Iterator[_Turn]:
    """What may be turned, what costs least first."""

    def turn(shrinks: frozenset[str] = frozenset(), **changes: Any) -> _Turn:
        other = copy.copy(config)
        for key, value in changes.items():
            setattr(other, key, value)
        keys = ", ".join(f"{key}: {_as_yaml(value)}" for key, value in changes.items())
        return _Turn(keys, other, machine, shrinks)

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
        yield _Turn("FSDP, which shards both models", config, replace(machine, sharded=True), MODELS)
    teacher = dict(config.teacher_model_init_kwargs or {})
    if machine.is_gpu and "device_map" not in teacher and not config.teacher_offload:
        yield turn(frozenset({TEACHER}), teacher_offload=True)
    if teacher.get("dtype", "float32") == "float32":
        yield turn(frozenset({TEACHER}), teacher_model_init_kwargs=teacher | {"dtype": "bfloat16"})
    if len(longest.response_ids) > 1:
        yield turn(max_completion_length=len(longest.response_ids) // 2)


def _as_yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_yaml(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value).removeprefix("torch.")


def advice(plan: MemoryPlan, knob: Knob | None) -> str:
    """What to turn first, in words."""
    if knob is None:
        return "shorter rollouts, a smaller model or more ranks are left"
    return f"first turn {knob.keys} (saves {plan.peak_mb - knob.peak_mb:,.0f} MB)"
