"""What a training run will hold in memory, from its recipe alone.

The run's own optimiser step, last sampled token and update are executed on fake tensors, at the longest
rollout. So there is no formula that could differ from the code.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from oprd.foundation.errors import UserError, is_out_of_memory
from oprd.foundation.meters import MB
from oprd.preflight.longest import Longest
from oprd.preflight.planning.fakes import fake_ranks
from oprd.preflight.planning.footprint import BUCKETS, ENGINE, PROCESS, TEACHER
from oprd.preflight.planning.machine import Machine
from oprd.preflight.planning.rehearsal import Rehearsal
from oprd.rollouts.engines.vllm import CPU_CACHE_GIB


class Unplannable(UserError):
    """A model cannot be run on fake tensors, since what it computes depends on values."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part on one rank, at the fullest moment of the rollouts and of the update.

    `step` is the update, 0-based, that holds most: schedules switch terms on and off. On disk the trained
    model takes `model_bytes` and a checkpoint, which has the optimiser's state too, `checkpoint_bytes`; the
    run ends with `final_bytes`: the model or, of adapters, these and the whole model that they make.
    """

    rollout: dict[str, int]
    update: dict[str, int]
    step: int
    model_bytes: int
    checkpoint_bytes: int
    final_bytes: int

    @property
    def rollout_mb(self) -> float:
        """The fullest moment of the rollouts, in 10⁶ bytes: what `memory/rollout_peak_mb` measures."""
        return sum(self.rollout.values()) / MB

    @property
    def update_mb(self) -> float:
        """The fullest moment of the update, in 10⁶ bytes: what `memory/peak_mb` measures."""
        return sum(self.update.values()) / MB

    @property
    def peak_mb(self) -> float:
        """The fullest moment of all, in 10⁶ bytes."""
        return max(self.rollout_mb, self.update_mb)


def plan_memory(
    student: str, settings: Any, longest: Longest, machine: Machine, peft_config: Any = None
) -> MemoryPlan:
    """The plan of a run with the keys of `settings`, an `OPRDConfig`.

    Raises `UserError` as the run would, and `Unplannable` where only the run itself can show it.
    """
    with _explained(student), fake_ranks(machine) as mesh:
        rehearsal = Rehearsal(student, settings, longest, machine, peft_config, mesh)
        measure = rehearsal.footprint.peak_of
        measure(rehearsal.first_step)
        updates = [(measure(partial(rehearsal.update, step)), step) for step in _steps(settings)]
        update, step = max(updates, key=lambda each: sum(each[0].values()))
        rollout = measure((lambda: None) if settings.use_vllm else rehearsal.roll_out)
    unseen = _unseen(settings, rehearsal, machine)
    rollout, update = rollout | unseen, update | unseen
    if settings.vllm_enable_sleep_mode:
        update.pop(ENGINE, None)
    return MemoryPlan(rollout, update, step, *rehearsal.saved_bytes)


def _unseen(settings: Any, rehearsal: Rehearsal, machine: Machine) -> dict[str, int]:
    """Parts that no rehearsal shows: libraries, weights at rest elsewhere, DDP's buckets, an engine."""
    parts = {PROCESS: machine.process_bytes} if machine.process_bytes else {}
    if (resting := rehearsal.resting_teacher_bytes) is not None:
        parts[TEACHER] = resting
    if machine.ranks > 1 and not machine.sharded:
        parts[BUCKETS] = sum(weight.nbytes for weight in rehearsal.trained)
    if settings.use_vllm and settings.vllm_mode == "colocate":  # a share of the GPU, or cache and weights
        share = int(settings.vllm_gpu_memory_utilization * machine.device_bytes)
        weights = 4 * sum(weight.numel() for weight in rehearsal.student.parameters())
        parts[ENGINE] = share if machine.is_gpu else CPU_CACHE_GIB * 2**30 + weights
    return parts


def fullest_step(settings: Any) -> int:
    """The update, 0-based, with most terms: which one to try where none can be planned."""
    schedules = settings.schedules.values()
    return max(_steps(settings), key=lambda step: sum(schedule(step) > 0 for schedule in schedules))


def _steps(settings: Any) -> list[int]:
    """One update, 0-based, of every kind: those that differ in the terms that are on."""
    schedules = settings.schedules.values()
    knots = {step + after for schedule in schedules for step, _ in schedule.knots for after in (0, 1)}
    last = settings.max_steps - 1 if settings.max_steps > 0 else max(knots)
    steps = sorted({min(knot, last) for knot in knots}, reverse=True)
    return list({tuple(schedule(step) > 0 for schedule in schedules): step for step in steps}.values())


@contextmanager
def _explained(student: str) -> Iterator[None]:
    """Explain errors of architectures whose computation depends on values or on the dtype.

    What the run itself will log of frozen and tied weights is not told: a plan is made many times.
    """
    logger = logging.getLogger("oprd")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        why = f"they do not run on fake tensors ({error}): try it with oprd train --dry_run"
        raise Unplannable(
            f"the memory of {student} and its teacher cannot be planned, since {why}"
        ) from error
    finally:
        logger.setLevel(level)
