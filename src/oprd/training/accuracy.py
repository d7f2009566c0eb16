"""What is followed during a run: its rollouts and its accuracy, which is measured here."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from oprd.evaluation.problems import EvalSettings, response_room
from oprd.evaluation.shared import evaluate_on_ranks
from oprd.folders.run_folder import output_folder
from oprd.foundation.errors import UserError
from oprd.objective.settings import mapping
from oprd.rollouts.generation import Sampling
from oprd.rollouts.progress import tokens_shown
from oprd.rollouts.prompts import load_prompts
from oprd.training.behaviour import BehaviourWatch
from oprd.training.best_model import BestModel
from oprd.training.collapse import CollapseWatch
from oprd.training.config import OPRDConfig
from oprd.training.run_arguments import RunArguments
from oprd.training.trainer import OPRDTrainer
from oprd.training.watch import Watch

logger = logging.getLogger(__name__)


def watched(run: RunArguments, config: OPRDConfig, trainer: OPRDTrainer) -> list[Watch]:
    """Have `trainer` watch its rollouts and, with problems to grade, measure and watch its accuracy.

    `stop_on_collapse` goes by accuracy where it is measured, else by the rollouts. `load_best` keeps the best
    model.
    """
    recorder, graded = trainer.recorder, bool(run.accuracy_dataset_name)
    watches: list[Watch] = [BehaviourWatch(None if graded else run.stop_on_collapse)]
    followers: list[Watch | BestModel] = [*watches]
    if graded:
        recorder.observers.append(_observer(run, config, trainer))
        watches.append(CollapseWatch(run.accuracy_problems, run.stop_on_collapse))
        followers.append(watches[-1])
    if run.load_best:
        followers.append(BestModel(trainer, output_folder(config)))
    for follower in followers:
        recorder.observers.append(follower.observe)
        recorder.resumers.append(follower.resume)
    for watch in watches:
        trainer.add_callback(watch)
    return watches


def _observer(
    run: RunArguments, config: OPRDConfig, trainer: OPRDTrainer
) -> Callable[[int, dict[str, float]], dict[str, float]]:
    """Measures accuracy every `accuracy_steps` steps, and at the first and last one.

    The run's random state is not touched.
    """
    assert run.accuracy_dataset_name is not None
    rows = load_prompts(run.accuracy_dataset_name, run.accuracy_dataset_split)
    rows = rows.select(range(min(run.accuracy_problems, len(rows))))
    settings = EvalSettings(
        samples=run.accuracy_samples,
        batch_size=_responses_at_once(config),
        chat_template_kwargs=mapping("chat_template_kwargs", config.chat_template_kwargs) or None,
    )
    room = response_room(trainer.model, trainer.processing_class, rows, settings)
    if room is not None and room < 1:
        raise UserError(f"a prompt of accuracy_dataset_name: {run.accuracy_dataset_name} fills the context")
    longest = min(config.max_completion_length or 512, math.inf if room is None else room)
    settings = replace(settings, sampling=Sampling(max_new_tokens=int(longest)))

    def observe(step: int, _: dict[str, float]) -> dict[str, float]:
        if step % run.accuracy_steps and step not in (1, trainer.state.max_steps):
            return {}
        model = trainer.accelerator.unwrap_model(trainer.model)
        shown = tokens_shown(trainer.recorder.bar, "accuracy", model, settings.sampling.max_new_tokens)
        with trainer.whole_student(), shown:
            summary = evaluate_on_ranks(model, trainer.processing_class, rows, settings)
        found = summary["avg_at_k"], summary["ci95_low"], summary["ci95_high"]
        logger.info(
            "step %d: accuracy %s, 95 %% interval %s–%s, of %d problems × %d samples",
            *(step, *(f"{share:.1%}" for share in found), len(rows), settings.samples),
        )
        return {f"eval/{name}": value for name, value in summary.items()}

    return observe


def _responses_at_once(config: OPRDConfig) -> int:
    """As many as a rank has room for: its rollouts of a step or, where vLLM holds those, a micro-batch."""
    micro_batch = config.per_device_train_batch_size
    return micro_batch if config.use_vllm else micro_batch * config.gradient_accumulation_steps
