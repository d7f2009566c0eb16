"""`oprd train RECIPE --dry_run`: real updates of the longest rollouts, to see whether they fit, and no run."""

import copy
import os
import tempfile
from typing import Any

import torch
from datasets import Dataset

from oprd.decoding import sample_last_token
from oprd.longest import Longest, rollouts_at_once
from oprd.trainer import OPRDConfig, OPRDTrainer

STEPS = 2  # the first makes the optimiser's state, which the second has to fit beside


class DryRunTrainer(OPRDTrainer):
    """An `OPRDTrainer` that is given the longest rollouts; the last token of each is sampled in earnest."""

    longest: Longest
    rollouts_per_step: int

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.use_vllm:
            rollouts = self.longest.rollouts(self.rollouts_per_step, self.accelerator.device)
            with self.accelerator.autocast():
                sample_last_token(self.accelerator.unwrap_model(self.model_wrapped), rollouts, self.args)
        return [list(self.longest.response_ids) for _ in prompt_ids]


def dry_run(student: str, config: OPRDConfig, longest: Longest, step: int, **kwargs: Any) -> dict[str, float]:
    """Two steps at the longest length with the terms of update `step`; returns the `memory/…` they reached.

    A step has two micro-batches at most. Everything is thrown away: models, random state, folder.
    Raises `UserError` as a run would, and whatever the memory running out raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = _short(config, longest, step, folder)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * _world_size()
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
            for name in values.keys() & {"memory/peak_mb", "memory/rollout_peak_mb"}:
                peaks[name] = max(values[name], peaks.get(name, 0.0))
            return {}

        trainer.recorder.observers.append(keep)
        trainer.train()
    return peaks


def _short(config: OPRDConfig, longest: Longest, step: int, folder: str) -> OPRDConfig:
    """The recipe for two steps that keep nothing."""
    args = copy.copy(config)
    for term, schedule in config.schedules.items():
        setattr(args, f"{term}_weight", str(schedule(step)))
    args.gradient_accumulation_steps = _accumulation(config, longest)
    args.output_dir, args.max_steps, args.save_strategy = folder, STEPS, "no"
    args.report_to, args.disable_tqdm, args.push_to_hub = [], True, False
    return args


def _accumulation(config: OPRDConfig, longest: Longest) -> int:
    """The fewest micro-batches that hold two full ones, and whole prompts."""
    each, most = config.per_device_train_batch_size, config.gradient_accumulation_steps
    size, count = rollouts_at_once(config, longest, each, most)
    wanted = -(-size * min(count, 2) // each)
    whole = (n for n in range(wanted, most) if not n * each * _world_size() % config.num_generations)
    return next(whole, most)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
