"""`oprd train RECIPE --dry_run`: two updates of the longest rollouts, to see whether they fit in memory."""

import copy
import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from datasets import Dataset

from oprd.foundation.errors import Fault, memory_may_run_out, refusals_told
from oprd.foundation.meters import MB, resident_mb
from oprd.foundation.ranks import Ranks
from oprd.preflight.doctor import longest_rollout
from oprd.preflight.longest import Longest, rollouts_at_once, sample_last_token
from oprd.preflight.planning.knobs import advice, first_knob
from oprd.preflight.planning.machine import Machine
from oprd.preflight.planning.memory_plan import MemoryPlan, Unplannable, fullest_step, plan_memory
from oprd.rollouts.engines.student import StudentEngine
from oprd.rollouts.rows import RolloutInputs
from oprd.training.config import OPRDConfig
from oprd.training.run_arguments import RunArguments
from oprd.training.trainer import OPRDTrainer

PEAKS = "memory/peak_mb", "memory/rollout_peak_mb"
UNPLANNED = "first turn gradient_checkpointing: true, then halve the micro-batch"
HOPELESS = 2  # a plan of more than this times the free memory is not tried
STEPS = 2  # the first makes the optimiser's state, which the second has to fit beside


class DryRunTrainer(OPRDTrainer):
    """An `OPRDTrainer` that is given the longest rollouts, whose last token generate really samples."""

    longest: Longest
    rollouts_per_step: int

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.use_vllm:
            rollouts = self.longest.rollouts(self.rollouts_per_step, self.accelerator.device)
            with self.whole_student(), self.accelerator.autocast():
                sample_last_token(self.accelerator.unwrap_model(self.model_wrapped), rollouts, self.args)
        return [list(self.longest.response_ids) for _ in prompt_ids]

    def _read_engine(self, engine: StudentEngine, batch: RolloutInputs) -> RolloutInputs:
        return {"engine_log_probs": torch.zeros(batch["completion_ids"].shape, device=self.args.device)}


def try_longest(run: RunArguments, config: OPRDConfig) -> str:
    """Run the longest update of a recipe; returns one sentence with the measured and the planned memory.

    Raises `UserError` for what the user can fix and, if memory runs out, `Fault` with what to turn.
    """
    longest, _ = longest_rollout(run, config, Ranks.launched().count)
    machine = Machine.here(config)  # beside the prompts
    room = _room(machine)  # before planning, which widens the heap without filling it
    plan = _plan(run, config, longest, machine)
    step = plan.step if plan else fullest_step(config)
    started = time.perf_counter()
    peaks = None
    hopeless = plan is not None and plan.peak_mb * MB > HOPELESS * machine.free_bytes
    if not hopeless:
        with memory_may_run_out(), _limited(room):
            peaks = dry_run(run.model_name_or_path, config, longest, step, peft_config=run.lora)
    if peaks is None:
        gc.collect()  # what the run held, or no plan of a knob would find room
        where = f"out of memory at the longest rollout ({longest.num_tokens} tokens"
        if plan is None:
            raise Fault(f"{where}); {UNPLANNED}")
        sizes = f"planned {plan.peak_mb:,.0f} of {machine.free_bytes / MB:,.0f} MB"
        raise Fault(f"{where}, {sizes}); {_what_to_turn(run, config, longest, machine, plan)}")
    took = (
        f"{STEPS} steps of {longest.num_tokens}-token rollouts fit, in {time.perf_counter() - started:.0f} s"
    )
    return f"dry run: {took}; {_beside(peaks, plan)}; no run was started"


def _plan(run: RunArguments, config: OPRDConfig, longest: Longest, machine: Machine) -> MemoryPlan | None:
    with suppress(Unplannable), memory_may_run_out(), refusals_told():  # shapes, too, take some room
        return plan_memory(run.model_name_or_path, config, longest, machine, run.lora)
    return None


def _what_to_turn(
    run: RunArguments, config: OPRDConfig, longest: Longest, machine: Machine, plan: MemoryPlan
) -> str:
    with memory_may_run_out():
        return advice(plan, first_knob(run.model_name_or_path, config, longest, machine, plan, run.lora))
    return UNPLANNED


def _beside(peaks: dict[str, float], plan: MemoryPlan | None) -> str:
    """What was measured beside what was planned."""
    planned = (plan.update_mb, plan.rollout_mb) if plan else (None, None)
    shown = [
        f"{name} {peaks[name]:,.0f} ({'not planned' if size is None else f'planned {size:,.0f}'})"
        for name, size in zip(PEAKS, planned, strict=True)
        if name in peaks
    ]
    return ", ".join(shown) or "their memory cannot be measured here"


def dry_run(student: str, config: OPRDConfig, longest: Longest, step: int, **kwargs: Any) -> dict[str, float]:
    """Two steps at the longest length with the terms of update `step`; returns the `memory/…` they reached.

    A step has two micro-batches at most. Everything is thrown away: models, random state, folder.
    Raises `UserError` as a run would, and whatever the memory running out raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = _short(config, longest, step, folder)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * Ranks.launched().count
        with refusals_told():
            trainer = DryRunTrainer(
                model=student,
                args=args,
                train_dataset=Dataset.from_list([{"prompt": longest.prompt}] * rows),
                **kwargs,
            )
        trainer.longest = longest
        trainer.rollouts_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        peaks: dict[str, float] = {}

        def keep(_: int, values: dict[str, float]) -> dict[str, float]:
            for name in values.keys() & set(PEAKS):
                peaks[name] = max(values[name], peaks.get(name, 0.0))
            return {}

        trainer.recorder.observers.append(keep)
        trainer.train()
    return peaks


def _short(config: OPRDConfig, longest: Longest, step: int, folder: str) -> OPRDConfig:
    """The recipe, for two steps that save nothing."""
    args = copy.copy(config)
    for term, schedule in config.schedules.items():
        setattr(args, f"{term}_weight", str(schedule(step)))
    args.gradient_accumulation_steps = _accumulation(config, longest)
    args.output_dir, args.max_steps, args.save_strategy = folder, STEPS, "no"
    args.mask_truncated_completions = False  # the longest response has no end, and is to be supervised
    args.report_to, args.disable_tqdm, args.push_to_hub = [], True, False
    return args


def _accumulation(config: OPRDConfig, longest: Longest) -> int:
    """The fewest micro-batches that hold two full ones, and whole prompts."""
    each, most = config.per_device_train_batch_size, config.gradient_accumulation_steps
    size, count = rollouts_at_once(config, longest)
    wanted = -(-size * min(count, 2) // each)
    whole = (n for n in range(wanted, most) if not n * each * Ranks.launched().count % config.num_generations)
    return next(whole, most)


def _room(machine: Machine) -> int | None:
    """What this process may hold by `RLIMIT_DATA`, with all that is free: on Linux without an accelerator."""
    if machine.device.type != "cpu" or not machine.process_bytes:
        return None
    return int(resident_mb("VmData") * MB) + machine.free_bytes - machine.process_bytes


@contextmanager
def _limited(room: int | None) -> Iterator[None]:
    """Refuse memory beyond `room`: otherwise the system would kill the process without a message."""
    if room is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [room, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
